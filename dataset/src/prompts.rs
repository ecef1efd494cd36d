//! Sets of prompts to draw, as DPG-Bench ships them: a folder of `.txt` files, a prompt each, or a `.csv` file with a row for each question
//! (columns `item_id` and `text`; DSG-1k's form too).
//!
//! A prompt's name becomes a picture's file name, and the official scorer takes what stands before that name's first dot for the item
//! (paper §3.3): names that would not come back from there are refused, by file or line.

use std::collections::BTreeMap;
use std::path::Path;

use ella_store::{Digest, Hasher, Store};
use futures::{StreamExt as _, TryStreamExt as _, stream};

use crate::error::DataError;
use crate::source::rows::{Format, Row, Rows, values};

/// Larger files are no prompts.
const MOST_TEXT: u64 = 1 << 20;
/// Larger files are no lists of questions: DPG-Bench's has 14,373 rows.
const MOST_LIST: u64 = 256 << 20;
/// Longer names leave no room for a file's ending.
const MOST_NAME: usize = 200;
/// Files read at once.
const AT_ONCE: usize = 16;
/// The columns that are read.
const COLUMNS: [&str; 2] = ["item_id", "text"];

/// A prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// Its name: `item_id`, or its file's without `.txt`.
    pub id: String,
    /// What is to be drawn, without white space around it.
    pub text: String,
}

/// Prompts in the order of their names, each name once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompts(Vec<Prompt>);

impl Prompts {
    /// Reads all prompts of a folder or a `.csv` file, at a path or URL. Other files in a folder are passed over, and those that are hidden; of
    /// a list's rows the first of each name counts.
    ///
    /// # Errors
    /// Nothing is there, or something that is no prompt: each names the file or the line, and what is wrong.
    pub async fn read(location: &str) -> Result<Self, DataError> {
        let found = if ending(location) == Some("csv") { of_list(location).await? } else { of_folder(location).await? };
        if found.is_empty() {
            return Err(wrong(location, "no prompt is there (expected .txt files, or a .csv file with rows)"));
        }
        Ok(Self(found.into_iter().map(|(id, text)| Prompt { id, text }).collect()))
    }

    /// The prompts.
    pub fn all(&self) -> &[Prompt] {
        &self.0
    }

    /// BLAKE3 over all names and texts, wherever they were read.
    pub fn digest(&self) -> Digest {
        let mut hasher = Hasher::new();
        for part in self.0.iter().flat_map(|prompt| [&prompt.id, &prompt.text]) {
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
        }
        hasher.finish()
    }
}

fn wrong(location: impl Into<String>, what: impl Into<String>) -> DataError {
    DataError::Prompts { location: location.into(), what: what.into() }
}

/// A name's ending, if it is one that matters here.
fn ending(name: &str) -> Option<&'static str> {
    let (_, found) = name.rsplit_once('.')?;
    ["txt", "csv"].into_iter().find(|known| found.eq_ignore_ascii_case(known))
}

async fn of_folder(location: &str) -> Result<BTreeMap<String, String>, DataError> {
    let store = Store::open(location)?;
    let files = match store.local_path() {
        Some(folder) => on_disk(location, &folder)?,
        None => store.files("").await?.into_iter().map(|meta| (meta.key, meta.bytes)).collect(),
    };
    let files = files.into_iter().filter(|(name, _)| ending(name) == Some("txt") && !name.starts_with('.'));
    let read = stream::iter(files).map(|(name, bytes)| one(&store, name, bytes)).buffered(AT_ONCE);
    let read: Vec<(String, String, String)> = read.try_collect().await?;
    let mut prompts = BTreeMap::new();
    for (file, id, text) in read {
        if prompts.insert(id.clone(), text).is_some() {
            return Err(wrong(format!("{location}/{file}"), format!("another file has the name {id:?} too; rename one")));
        }
    }
    Ok(prompts)
}

/// Names and sizes of a folder's files. A store's listing leaves out what is no UTF-8; here it is an error.
fn on_disk(location: &str, folder: &Path) -> Result<Vec<(String, u64)>, DataError> {
    if !folder.is_dir() {
        return Err(wrong(location, "is no folder (expected a folder of .txt files, or a file whose name ends in .csv)"));
    }
    let io = |source| DataError::Io { path: folder.to_owned(), source };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io)? {
        let entry = entry.map_err(io)?;
        let (name, path) = (entry.file_name(), entry.path());
        let is_prompt = path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("txt"));
        let Some(name) = name.to_str() else {
            let shown = path.display().to_string();
            if is_prompt {
                return Err(wrong(shown, "its name is not UTF-8; rename it"));
            }
            continue;
        };
        // What a link leads to counts.
        let meta = std::fs::metadata(&path).map_err(|source| DataError::Io { path: path.clone(), source })?;
        if meta.is_file() {
            files.push((name.to_owned(), meta.len()));
        }
    }
    files.sort();
    Ok(files)
}

/// A file of a folder: its name, the prompt's, and the prompt.
async fn one(store: &Store, file: String, bytes: u64) -> Result<(String, String, String), DataError> {
    let at = || format!("{}/{file}", store.url());
    let id = file.rsplit_once('.').map_or(file.as_str(), |(name, _)| name).to_owned();
    check_name(&id).map_err(|what| wrong(at(), what))?;
    if bytes > MOST_TEXT {
        return Err(wrong(at(), format!("has {bytes} bytes: more than {MOST_TEXT}, a prompt has not")));
    }
    let text = store.get(&file).await?;
    let text = text_of(&text).map_err(|what| wrong(at(), what))?;
    Ok((file, id, text))
}

/// A name that a picture's file can have, and that a scorer takes from that file's name.
fn check_name(id: &str) -> Result<(), String> {
    let rule = |rule: &str| Err(format!("the name {id:?} {rule}; rename it"));
    match id {
        "" => rule("is empty"),
        _ if id.contains('.') => {
            rule("has a dot: of a picture's file name only what stands before the first dot is an item's name to scorers")
        }
        _ if id.contains(['/', '\\']) || id.chars().any(char::is_control) => {
            rule("has a slash, a backslash or a control character, and becomes a picture's file name")
        }
        _ if id.trim() != id => rule("has white space at an end"),
        _ if id.len() > MOST_NAME => rule(&format!("has {} bytes (at most {MOST_NAME}: it becomes a picture's file name)", id.len())),
        _ => Ok(()),
    }
}

fn text_of(bytes: &[u8]) -> Result<String, String> {
    let text = std::str::from_utf8(bytes).map_err(|error| format!("is not UTF-8 (at byte {}); save it as UTF-8", error.valid_up_to()))?;
    let text = text.trim_start_matches('\u{feff}').trim();
    if text.is_empty() { Err("is empty (expected a prompt)".to_owned()) } else { Ok(text.to_owned()) }
}

async fn of_list(location: &str) -> Result<BTreeMap<String, String>, DataError> {
    let (folder, file) = match location.rsplit_once('/') {
        Some(("", file)) => ("/", file),
        Some(parts) => parts,
        None => (".", location),
    };
    let store = Store::open(folder)?;
    if let Some(meta) = store.head(file).await?.filter(|meta| meta.bytes > MOST_LIST) {
        return Err(wrong(location, format!("has {} bytes: more than {MOST_LIST}, a list of questions has not", meta.bytes)));
    }
    in_list(location, &store.get(file).await?)
}

/// Where a row of a list begins, and its values.
type Record = (u64, Vec<Vec<u8>>);

/// The prompts of a list's bytes.
fn in_list(location: &str, bytes: &[u8]) -> Result<BTreeMap<String, String>, DataError> {
    let mut rows = Rows::new(bytes, Format::Csv);
    let mut next = |what: &str| -> Result<Option<Record>, DataError> {
        match rows.next().map_err(|error| wrong(location, error.to_string()))? {
            None => Ok(None),
            Some(Row { at, bytes: Some(row) }) => Ok(Some((at, values(row).into_iter().map(|value| value.into_owned()).collect()))),
            Some(Row { at, bytes: None }) => {
                let rule = "a value in quotes must end in a quote and a comma, and quotes in it are doubled";
                Err(wrong(location, format!("line {}: {what} is no CSV record ({rule})", line(bytes, at))))
            }
        }
    };
    let Some((_, header)) = next("the header")? else {
        return Err(wrong(location, "is empty (expected a header, then a row for each question)"));
    };
    let header: Vec<String> = header.iter().map(|name| String::from_utf8_lossy(name).trim().to_owned()).collect();
    let column = |name: &str| {
        let missing = || wrong(location, format!("has no column {name} (found: {})", header.join(", ")));
        header.iter().position(|found| found == name).ok_or_else(missing)
    };
    let [id, text] = [column(COLUMNS[0])?, column(COLUMNS[1])?];
    let mut prompts = BTreeMap::new();
    while let Some((at, row)) = next("the row")? {
        let wrong = |what: String| wrong(location, format!("line {}: {what}", line(bytes, at)));
        if row.len() != header.len() {
            return Err(wrong(format!("the row has {} values, the header {}", row.len(), header.len())));
        }
        let value = |at: usize| row.get(at).map_or(&[][..], Vec::as_slice);
        let id = std::str::from_utf8(value(id)).map_err(|_| wrong("item_id is not UTF-8".to_owned()))?.trim();
        check_name(id).map_err(|what| wrong(format!("item_id: {what}")))?;
        if !prompts.contains_key(id) {
            prompts.insert(id.to_owned(), text_of(value(text)).map_err(|what| wrong(format!("text {what}")))?);
        }
    }
    Ok(prompts)
}

/// The line of a list, from 1, that the byte at `at` stands in.
fn line(bytes: &[u8], at: u64) -> usize {
    1 + bytes.iter().take(at as usize).filter(|byte| **byte == b'\n').count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            std::fs::write(dir.path().join(name), bytes).unwrap();
        }
        dir
    }

    async fn read(location: &Path) -> Result<Vec<(String, String)>, String> {
        let prompts = Prompts::read(location.to_str().unwrap()).await.map_err(|error| error.to_string())?;
        Ok(prompts.all().iter().map(|prompt| (prompt.id.clone(), prompt.text.clone())).collect())
    }

    fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(id, text)| ((*id).to_owned(), (*text).to_owned())).collect()
    }

    #[tokio::test]
    async fn a_folders_texts_are_prompts_by_their_names() {
        let files: [(&str, &[u8]); 5] = [
            ("b.txt", b" a blue square\n"),
            ("a 1.TXT", "\u{feff}a café".as_bytes()),
            ("notes.md", b"x"),
            (".hidden.txt", b"x"),
            ("c#1.txt", b"two\nlines"),
        ];
        let dir = folder(&files);
        std::fs::create_dir(dir.path().join("d.txt")).unwrap();
        assert_eq!(read(dir.path()).await.unwrap(), pairs(&[("a 1", "a café"), ("b", "a blue square"), ("c#1", "two\nlines")]));
    }

    #[tokio::test]
    async fn what_is_no_prompt_is_refused_by_file_and_rule() {
        let large = vec![b'x'; 1 + MOST_TEXT as usize];
        let long = format!("{}.txt", "n".repeat(MOST_NAME + 1));
        let cases: [(&str, &[u8], &str); 7] = [
            ("a.txt", b"caf\xe9 au lait", "/a.txt: is not UTF-8 (at byte 3)"),
            ("a.txt", b" \n", "/a.txt: is empty (expected a prompt)"),
            ("a.b.txt", b"x", "/a.b.txt: the name \"a.b\" has a dot"),
            ("a\\b.txt", b"x", "has a slash, a backslash"),
            ("a\n.txt", b"x", "a control character"),
            ("big.txt", &large, "/big.txt: has 1048577 bytes"),
            (&long, b"x", "has 201 bytes (at most 200"),
        ];
        for (name, bytes, words) in cases {
            let dir = folder(&[("fine.txt", b"fine"), (name, bytes)]);
            let error = read(dir.path()).await.unwrap_err();
            assert!(error.contains(words), "{name}: {error}");
        }
        let dir = folder(&[("a.txt", b"x"), ("a.TXT", b"y")]);
        assert!(read(dir.path()).await.unwrap_err().contains("another file has the name \"a\" too"));
        assert!(read(folder(&[("a.md", b"x")]).path()).await.unwrap_err().contains("no prompt is there"));
        assert!(read(&dir.path().join("a.txt")).await.unwrap_err().contains("a file is there"));
        assert!(read(&dir.path().join("gone")).await.unwrap_err().contains("is no folder"));
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn a_name_that_is_not_utf8_is_refused_and_not_passed_over() {
        use std::os::unix::ffi::OsStrExt as _;
        let dir = folder(&[("fine.txt", b"fine")]);
        std::fs::write(dir.path().join(std::ffi::OsStr::from_bytes(b"\xff.txt")), "x").unwrap();
        assert!(read(dir.path()).await.unwrap_err().contains("its name is not UTF-8"));
        std::fs::rename(
            dir.path().join(std::ffi::OsStr::from_bytes(b"\xff.txt")),
            dir.path().join(std::ffi::OsStr::from_bytes(b"\xff.md")),
        )
        .unwrap();
        assert_eq!(read(dir.path()).await.unwrap(), pairs(&[("fine", "fine")]));
    }

    #[tokio::test]
    async fn of_a_list_the_first_text_of_each_item_counts() {
        let list = "item_id,text,question_natural_language\nb,\"a \"\"blue\"\" square,\nand a dot\",is it?\n\nb,other,is it blue?\r\n\"a\",A café,x\n";
        let dir = folder(&[("q.csv", list.as_bytes())]);
        let expected = pairs(&[("a", "A café"), ("b", "a \"blue\" square,\nand a dot")]);
        assert_eq!(read(&dir.path().join("q.csv")).await.unwrap(), expected);
        // The same prompts, wherever they were read, are the same set.
        let same = folder(&[("a.txt", "A café".as_bytes()), ("b.txt", b"a \"blue\" square,\nand a dot")]);
        let digest = async |path: &Path| Prompts::read(path.to_str().unwrap()).await.unwrap().digest();
        assert_eq!(digest(&dir.path().join("q.csv")).await, digest(same.path()).await);
        assert_ne!(digest(folder(&[("a.txt", b"bc")]).path()).await, digest(folder(&[("ab.txt", b"c")]).path()).await);
    }

    #[test]
    fn a_list_that_is_none_is_refused_by_line() {
        let cases: [(&[u8], &str); 9] = [
            (b"", "is empty (expected a header"),
            (b"id,text\na,b\n", "has no column item_id (found: id, text)"),
            (b"item_id,prompt\na,b\n", "has no column text (found: item_id, prompt)"),
            (b"item_id,text\na,b\nc\n", "line 3: the row has 1 values, the header 2"),
            (b"item_id,text\na,\"b\nc\"\n,d\n", "line 4: item_id: the name \"\" is empty"),
            (b"item_id,text\na/b,c\n", "line 2: item_id: the name \"a/b\" has a slash"),
            (b"item_id,text\na,\n", "line 2: text is empty"),
            (b"item_id,text\na,\xff\n", "line 2: text is not UTF-8"),
            (b"item_id,text\na,\"b\" c\n", "line 2: the row is no CSV record"),
        ];
        for (bytes, words) in cases {
            let error = in_list("q.csv", bytes).unwrap_err().to_string();
            assert!(error.starts_with("q.csv: ") && error.contains(words), "{error}");
        }
        assert!(in_list("q.csv", b"item_id,text\n").unwrap().is_empty());
    }
}
