//! Sources: what locations name, what their rows are taken for, and that broken ones are refused.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::path::Path;

use common::{jpeg, read, read_pieces, refused, small, source, tar_of};
use ella_dataset::{DataError, Field, Fields, Member, Piece, PrepareOptions, Refusal, Sample, Source, SourceKind, SourceOptions, prepare};
use ella_store::Store;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn text(text: &str) -> Field {
    Field::Text(text.into())
}

fn fields(fields: &[(&str, Field)]) -> Fields {
    fields.iter().map(|(name, field)| ((*name).to_owned(), field.clone())).collect()
}

fn write(folder: &Path, files: &[(&str, &[u8])]) {
    for (name, bytes) in files {
        let path = folder.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
}

/// Keys, each with what became of its picture.
fn outcome(samples: &[Sample]) -> Vec<String> {
    let of = |sample: &Sample| match (&sample.refused, &sample.image) {
        (Some(why), _) => format!("{}: {why}", sample.key),
        (None, Member::Data(bytes)) => format!("{}: {}", sample.key, String::from_utf8_lossy(bytes)),
        (None, other) => format!("{}: {other:?}", sample.key),
    };
    samples.iter().map(of).collect()
}

#[tokio::test]
async fn a_tars_texts_and_json_entries_are_fields() {
    let dir = TempDir::new().unwrap();
    let long = vec![b'x'; (1 << 20) + 1];
    let json = br#"{"caption": "c", "score": 6.5, "txt": "not this", "none": null, "tags": ["a"], "big": 12345678901234567890}"#;
    let tar = tar_of(&[
        ("a.jpg", b"A"),
        ("a.json", json),
        ("a.txt", b" text\n"),
        ("a.Short.TXT", b"short"),
        ("a.cls", b"3"),
        ("b.txt", b"caf\xe9"),
        ("b.json", b"[1]"),
        ("c.txt", &long),
        ("c.json", b"\xff{}"),
        ("c.png", b"C"),
        ("c.jpg", b"second"),
        ("d.GIF", b"D"),
        ("d.json", b"\xef\xbb\xbf{\"caption\": \"NaN\", \"score\": NaN, \"low\": -Infinity, \"high\": 2}"),
        ("e.caption", b"a cup"),
        ("e.json", b"{\"caption\": \"not this\"}"),
    ]);
    let samples = read(&source(dir.path(), "s.tar", &tar).await).await.unwrap();
    let expected = fields(&[
        ("caption", text("c")),
        ("score", Field::Number(6.5)),
        ("txt", text(" text\n")),
        ("short.txt", text("short")),
        ("none", Field::Other),
        ("tags", Field::Other),
        ("big", Field::Number(12345678901234567890.0)),
    ]);
    assert_eq!(samples[0].fields, expected);
    assert_eq!(samples[1].fields, fields(&[("txt", Field::NotUtf8), ("json", Field::Other)]));
    assert_eq!(samples[2].fields, fields(&[("txt", Field::TooLong), ("json", Field::NotUtf8)]));
    // What Python writes of numbers that are none costs no more than that field.
    let expected = fields(&[("caption", text("NaN")), ("score", Field::Other), ("low", Field::Other), ("high", Field::Number(2.0))]);
    assert_eq!(samples[3].fields, expected);
    assert_eq!(samples[4].fields, fields(&[("caption", text("a cup"))]));
    assert_eq!(outcome(&samples), ["a: A", "b: Absent", "c: C", "d: D", "e: Absent"]);
}

#[tokio::test]
async fn rows_of_json_name_pictures_wherever_they_are() {
    let dir = TempDir::new().unwrap();
    let root = dir.path().canonicalize().unwrap();
    write(&root, &[("beside.jpg", b"1"), ("set/in/0.jpg", b"2"), ("a b.jpg", b"3")]);
    let lines = [
        r#"{"file_name": "in/0.jpg", "caption": "c", "url": "unused", "score": 3}"#.into(),
        r#"{"file_name": "../beside.jpg", "key": "own"}"#.into(),
        format!(r#"{{"file_name": "{}/beside.jpg", "id": 9007199254740993}}"#, root.display()),
        format!(r#"{{"url": "file://{}/a%20b.jpg", "__key__": "url"}}"#, root.display()),
        String::new(),
        r#"{"file_name": "none.jpg"}"#.into(),
        r#"{"file_name": "in/0.jpg/deeper.jpg"}"#.into(),
        r#"{"file_name": null}"#.into(),
        r#"{"file_name": "in"}"#.into(),
        r#"{"caption": "no picture"}"#.into(),
        r#"{"file_name": "ftp://host/a.jpg"}"#.into(),
        r#"{"file_name": "in/0.jpg", "#.into(),
        r#"["in/0.jpg"]"#.into(),
        format!(r#"{{"file_name": "{}.jpg"}}"#, "n".repeat(300)),
        r#"{"file_name": "in/0.jpg", "key": "nan", "score": NaN}"#.into(),
        r#"{"image_file": "in/0.jpg", "key": "docci", "example_id": "x"}"#.into(),
        r#"{"file_name": "in/0.jpg", "caption": "half \ud83d"}"#.into(),
    ];
    let source = source(&root.join("set"), "list.jsonl", lines.join("\n").as_bytes()).await;
    let samples = read(&source).await.unwrap();
    let long = format!("{}: Absent", "n".repeat(300));
    let expected = [
        "in/0: 2",
        "own: 1",
        "9007199254740993: 1",
        "url: 3",
        "none: Absent",
        "in/0.jpg/deeper: Absent",
        "list/000000006: Absent",
        "in: Absent",
        "list/000000008: Absent",
        "ftp://host/a: row_invalid",
        "list/000000010: row_invalid",
        "list/000000011: row_invalid",
        &long,
        "nan: 2",
        "docci: 2",
        "list/000000015: row_invalid",
    ];
    assert_eq!(outcome(&samples), expected);
    let first = fields(&[("file_name", text("in/0.jpg")), ("caption", text("c")), ("url", text("unused")), ("score", Field::Number(3.0))]);
    assert_eq!(samples[0].fields, first);
}

/// A server that answers a path `/STATUS` with that, `/round` with a redirect to itself, and others with a picture.
async fn web() -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut connection, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut request = vec![0; 4096];
                let read = connection.read(&mut request).await.unwrap();
                let request = String::from_utf8_lossy(&request[..read]).into_owned();
                let path = request.split(' ').nth(1).unwrap_or_default().trim_start_matches('/').to_owned();
                let (status, more) = match path.parse::<u16>() {
                    Ok(status) => (format!("{status} Other"), String::new()),
                    Err(_) if path == "round" => ("302 Found".to_owned(), "Location: /round\r\n".to_owned()),
                    Err(_) => ("200 OK".to_owned(), String::new()),
                };
                let reply = format!("HTTP/1.1 {status}\r\nContent-Length: 3\r\n{more}Connection: close\r\n\r\nweb");
                connection.write_all(reply.as_bytes()).await.unwrap();
            });
        }
    });
    url
}

/// One bad address among millions must not cost the others.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_whose_picture_cannot_be_had_costs_that_row_only() {
    let (dir, url) = (TempDir::new().unwrap(), web().await);
    let root = dir.path().canonicalize().unwrap();
    std::os::unix::fs::symlink("round", root.join("round")).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(root.join("pipe")).status().unwrap().success());
    let missing = ["400", "401", "403", "404", "410", "451", "round"].map(|path| format!("{url}/{path}"));
    let local = ["round", "pipe"].map(str::to_owned);
    let invalid = ["http://[::bad/x.jpg", "http://127.0.0.1:999999/x.jpg", "http://a b/x.jpg", "s3://Bad Bucket/x.jpg"].map(str::to_owned);
    let good = format!("{url}/picture.jpg");
    let rows = missing.iter().chain(&local).chain(&invalid).chain([&good]).enumerate();
    let list: String = rows.map(|(row, place)| format!("{{\"key\": \"{row}\", \"url\": \"{place}\"}}\n")).collect();
    let found = read(&source(&root, "list.jsonl", list.as_bytes()).await).await.unwrap();
    let became: Vec<String> = outcome(&found).into_iter().map(|told| told.split_once(": ").unwrap().1.to_owned()).collect();
    let expected = [["Absent"; 9].as_slice(), &["row_invalid"; 4], &["web"]].concat();
    assert_eq!(became, expected);

    // What a server may get over is an error that names the list and the row.
    let list = format!("{{\"key\": \"full\", \"url\": \"{url}/507\"}}\n");
    let error = read(&source(&root, "full.jsonl", list.as_bytes()).await).await.unwrap_err();
    let said = error.to_string();
    assert!(!error.is_permanent() && ["full.jsonl", "row \"full\"", "/507"].iter().all(|word| said.contains(word)), "{said}");
}

/// Its opening would wait for ever, and with it the command.
#[tokio::test]
async fn a_source_that_is_a_pipe_is_refused_at_once() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("pipe.tar");
    assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
    let error = Source::find(path.to_str().unwrap()).await.unwrap_err();
    assert!(error.is_permanent() && error.to_string().contains("a pipe, socket or device"), "{error}");
}

#[tokio::test]
async fn rows_of_csv_have_the_headers_fields() {
    let dir = TempDir::new().unwrap();
    write(dir.path(), &[("1.jpg", b"1"), ("2.jpg", b"2")]);
    let csv = b"\xef\xbb\xbffile_name, caption ,score,id\r\n\
        1.jpg,\"two lines\r\nand a \"\"quote\"\"\",6.25,x\r\n\
        2.jpg,1984,,\r\n\
        1.jpg,too few\r\n\
        1.jpg,\"open,1,y\r\n\
        2.jpg,caf\xe9,nan,\xff\r\n\
        \r\n\
        2.jpg,last,-.5e3,z";
    let samples = read(&source(dir.path(), "metadata.csv", csv).await).await.unwrap();
    let expected = ["x: 1", "2: 2", "metadata/000000002: row_invalid", "metadata/000000003: row_invalid", "\u{fffd}: 2", "z: 2"];
    assert_eq!(outcome(&samples), expected);
    assert_eq!(samples[0].fields["caption"], text("two lines\r\nand a \"quote\""));
    assert_eq!((&samples[0].fields["score"], &samples[1].fields["score"]), (&Field::Number(6.25), &text("")));
    assert_eq!((&samples[1].fields["caption"], &samples[5].fields["score"]), (&Field::Number(1984.0), &Field::Number(-500.0)));
    assert_eq!((&samples[4].fields["caption"], &samples[4].fields["score"]), (&Field::NotUtf8, &text("nan")));
    assert_eq!(samples.iter().map(|sample| sample.key_is_utf8).collect::<Vec<_>>(), [true, true, true, true, false, true]);
}

#[tokio::test]
async fn a_list_falls_into_pieces_that_hold_every_row_once() {
    let dir = TempDir::new().unwrap();
    let row = |i: usize| format!("{{\"file_name\": \"{}.jpg\", \"n\": {i}}}\n{}", i % 3, if i.is_multiple_of(7) { "\n" } else { "" });
    write(dir.path(), &[("0.jpg", b"0"), ("2.jpg", b"2")]);
    let list: String = (0..4500).map(row).collect();
    let source = source(dir.path(), "list.ndjson", list.as_bytes()).await;
    let pieces = source.pieces().await.unwrap();
    let rows: Vec<_> = pieces.iter().map(|piece| piece.rows.clone()).collect();
    assert_eq!(rows, [0..2000, 2000..4000, 4000..4500]);
    assert_eq!((pieces[0].bytes.start, pieces[2].bytes.end), (0, list.len() as u64));
    assert!(pieces.windows(2).all(|pair| pair[0].bytes.end == pair[1].bytes.start));
    let (samples, reads) = read_pieces(&source, &pieces).await.unwrap();
    let numbers: Vec<_> = samples.iter().map(|sample| sample.fields["n"].clone()).collect();
    assert_eq!(numbers, (0..4500).map(|i| Field::Number(f64::from(i))).collect::<Vec<_>>());
    assert!(samples.iter().enumerate().all(|(i, sample)| (sample.image == Member::Absent) == (i % 3 == 1)));
    // In another order, and alone: the same.
    let (again, last) = read_pieces(&source, &pieces[2..]).await.unwrap();
    assert_eq!((&again[..], last[0]), (&samples[4000..], reads[2]));
    // Another picture makes another digest of its piece.
    std::fs::write(dir.path().join("2.jpg"), b"other").unwrap();
    assert_ne!(read_pieces(&source, &pieces[2..]).await.unwrap().1[0], reads[2]);
}

#[tokio::test]
async fn an_array_of_rows_is_read_as_a_list_of_lines_is() {
    let dir = TempDir::new().unwrap();
    write(dir.path(), &[("0.jpg", b"0"), ("2.jpg", b"2")]);
    let row = |i: usize| match i % 11 {
        5 => "[]".to_owned(),
        7 => r#"{"file_name": }"#.to_owned(),
        _ => format!(r#"{{"file_name": "{}.jpg", "n": {i}, "turns": [{{"value": "],[\"{i}"}}]}}"#, i % 3),
    };
    let rows: Vec<String> = (0..4500).map(row).collect();
    let lines = source(dir.path(), "list.jsonl", rows.join("\n").as_bytes()).await;
    let pretty = rows.join(" ,\r\n ").replace(", \"n\"", ",\n\t\"n\"");
    let array = source(dir.path(), "list.json", format!("\u{feff}[\n{pretty}\n]\n").as_bytes()).await;
    assert_eq!(array.kind(), SourceKind::Json);
    let (of_lines, of_array) = (lines.pieces().await.unwrap(), array.pieces().await.unwrap());
    let numbers = |pieces: &[Piece]| pieces.iter().map(|piece| piece.rows.clone()).collect::<Vec<_>>();
    assert_eq!(numbers(&of_array), numbers(&of_lines));
    let expected = read_pieces(&lines, &of_lines).await.unwrap();
    assert!(read_pieces(&array, &of_array).await.unwrap() == expected);
    let (last, read) = read_pieces(&array, &of_array[2..]).await.unwrap();
    assert!(last == expected.0[4000..] && read[0] == expected.1[2]);
}

#[tokio::test]
async fn columns_can_be_named() {
    let dir = TempDir::new().unwrap();
    write(dir.path(), &[("1.jpg", b"1"), ("2.jpg", b"2"), ("l.csv", b"file_name,other,key,code\n1.jpg,2.jpg,k,c\n1.jpg,2.jpg,k,\n")]);
    let location = dir.path().join("l.csv").to_str().unwrap().to_owned();
    let options = SourceOptions { image_column: Some("other".into()), key_column: Some("code".into()) };
    let found = Source::find_with(&location, &options).await.unwrap();
    assert_eq!(outcome(&read(&found[0]).await.unwrap()), ["c: 2", "2: 2"]);
    let options = SourceOptions { image_column: Some("none".into()), key_column: None };
    let error = Source::find_with(&location, &options).await.unwrap()[0].pieces().await.unwrap_err();
    let DataError::SourceColumns { source_name, expected, found } = error else { panic!("{error}") };
    assert_eq!((source_name, expected.as_str(), found.as_str()), (location, "none", "file_name, other, key, code"));
}

#[tokio::test]
async fn lists_that_are_none_are_errors_that_name_them() {
    let dir = TempDir::new().unwrap();
    let cases: [(&str, &[u8], &str); 13] = [
        ("blank.json", b"[ ]\n", "holds no rows"),
        ("columns.json", b"[{\"caption\": 1}]", "no column of pictures (expected one of: file_name, image_path"),
        ("object.json", b"{\"file_name\": \"a\"}\n{", "holds no array of rows"),
        ("cut.json", b"[{\"file_name\": \"a\"}, {\"fi", "its last row, 1, begins here) (at byte 20)"),
        ("twice.json", b"[{\"file_name\": \"a\"}] []", "goes on behind its array's end (expected nothing more) (at byte 21)"),
        ("empty.jsonl", b"", "holds no rows"),
        ("blank.jsonl", b"\n \n", "holds no rows"),
        ("columns.jsonl", b"{\"caption\": 1}\n", "no column of pictures (expected one of: file_name, image_path"),
        ("empty.csv", b"", "is empty"),
        ("header.csv", b"file_name,caption\n", "holds no rows"),
        ("columns.csv", b"a,b\n1,2\n", "found: a, b"),
        ("twice.csv", b"file_name,a,a\n1,2,3\n", "names the column \"a\" twice"),
        ("latin.csv", b"file_name,caf\xe9\n1,2\n", "is not UTF-8"),
    ];
    for (name, bytes, says) in cases {
        let error = source(dir.path(), name, bytes).await.pieces().await.unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(says), "{name}: {error}");
    }
}

#[tokio::test]
async fn a_source_that_changed_is_not_read() {
    let dir = TempDir::new().unwrap();
    for (name, before, same_size) in
        [("a.tar", tar_of(&[("a.txt", b"1")]), tar_of(&[("a.txt", b"2")])), ("a.csv", b"key\n1\n".to_vec(), b"key\n2\n".to_vec())]
    {
        let source = source(dir.path(), name, &before).await;
        let path = dir.path().join(name);
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, same_size).unwrap();
        let error = read(&source).await.unwrap_err();
        assert!(matches!(&error, DataError::SourceChanged { source_name, .. } if source_name.ends_with(name)), "{error}");
        std::fs::write(&path, b"shorter").unwrap();
        let error = read(&source).await.unwrap_err();
        assert!(matches!(&error, DataError::SourceChanged { found, .. } if found.contains('7')) || name == "a.csv", "{error}");
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(read(&source).await.unwrap_err(), DataError::SourceMissing { .. } | DataError::Store(_)));
    }
}

async fn found(location: &Path, below: &str) -> Result<String, String> {
    let location = format!("{}/{below}", location.display());
    let found = Source::find(&location).await.map_err(|error| error.to_string())?;
    let prefix = location.split(['*', '?', '[', '{']).next().unwrap();
    assert!(found.iter().all(|source| source.name().contains(prefix.rsplit_once('/').unwrap().0)), "{found:?}");
    Ok(found.iter().map(Source::file_name).collect::<Vec<_>>().join(" "))
}

#[tokio::test]
async fn locations_name_files_in_order() {
    let dir = TempDir::new().unwrap();
    let names =
        ["set/00.tar", "set/01.tar", "set/02.tar", "set/10.PARQUET", "deep/a/x.csv", "deep/b/x.csv", "odd/{1,2}[3].tar", "odd/1[3].tar"];
    write(dir.path(), &names.map(|name| (name, name.as_bytes())));
    for (below, expected) in [
        ("set", "00.tar 01.tar 02.tar 10.PARQUET"),
        ("set/", "00.tar 01.tar 02.tar 10.PARQUET"),
        ("set/{02..00}.tar", "00.tar 01.tar 02.tar"),
        ("set/0[12].tar", "01.tar 02.tar"),
        ("set/*.PARQUET", "10.PARQUET"),
        ("{set/*2.tar,deep/a/x.csv}", "x.csv 02.tar"),
        ("deep/*/x.csv", "x.csv x.csv"),
        ("**/x.csv", "x.csv x.csv"),
        ("odd/{1,2}[3].tar", "{1,2}[3].tar"),
    ] {
        assert_eq!(found(dir.path(), below).await.as_deref(), Ok(expected), "{below}");
    }
    let url = format!("file://{}/set/01.tar", dir.path().display());
    let by_url = Source::find(&url).await.unwrap();
    assert_eq!((by_url[0].name(), by_url[0].kind(), by_url[0].bytes()), (url.as_str(), SourceKind::Tar, 10));
    assert!(by_url[0].stamp().is_some());
}

#[tokio::test]
async fn a_brace_range_of_very_many_files_is_found_by_one_listing() {
    let dir = TempDir::new().unwrap();
    let names: Vec<String> = (0..300).map(|i| format!("{i:04}.tar")).collect();
    write(dir.path(), &names.iter().map(|name| (name.as_str(), &b"x"[..])).collect::<Vec<_>>());
    assert_eq!(found(dir.path(), "{0000..0299}.tar").await.unwrap(), names.join(" "));
    let error = found(dir.path(), "{0000..0300}.tar").await.unwrap_err();
    assert!(error.contains("0300.tar: no source is there"), "{error}");
}

#[tokio::test]
async fn locations_that_cannot_be_sources_are_errors() {
    let dir = TempDir::new().unwrap();
    write(
        dir.path(),
        &[
            ("a.tar", b"x"),
            ("b.tar.gz", b"x"),
            ("c.zip", b"x"),
            ("d.txt", b"x"),
            ("both/metadata.csv", b""),
            ("both/a.tar", b""),
            ("lists/a.jsonl", b""),
        ],
    );
    for (below, says) in [
        ("b.tar.gz", "unpack it first"),
        ("c.zip", "unpack it first"),
        ("d.txt", "is no source (expected a .tar, .parquet"),
        ("*", "is compressed"),
        ("none*.tar", "no source is there"),
        ("lists", "name other lists themselves"),
        ("none/x.tar", "no source is there"),
        ("{a,e}.tar", "e.tar: no source is there"),
        ("{a,a}.tar", "a.tar: is named twice"),
        ("[.tar", "is no pattern"),
        ("both", "holds both metadata.csv and a.tar"),
        ("{0..9999999}.tar", "more than 1000000"),
    ] {
        let error = found(dir.path(), below).await.unwrap_err();
        assert!(error.contains(says), "{below}: {error}");
    }
    let location = dir.path().join("a.tar").to_str().unwrap().to_owned();
    let folder = dir.path().join("*.tar").to_str().unwrap().to_owned();
    let error = Source::find_all(&[location, folder], &SourceOptions::default()).await.unwrap_err().to_string();
    assert!(error.contains("a.tar: is named twice"), "{error}");
}

#[tokio::test]
async fn sources_of_all_kinds_are_prepared_together() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let good = jpeg(48, 1);
    let words = "word ".repeat(100_000);
    write(
        dir.path(),
        &[
            ("a.tar", &tar_of(&[("one.jpg", &good), ("one.txt", b"from a tar")])),
            ("p/1.jpg", &good),
            ("b.jsonl", format!("{{\"file_name\": \"p/1.jpg\", \"text\": \"from json\"}}\n{{\"file_name\": \"p/2.jpg\", \"text\": \"x\"}}\n{{\n{{\"file_name\": \"p/1.jpg\", \"key\": \"long\", \"text\": \"{words}\"}}\n{{\"file_name\": \"p/1.jpg\", \"key\": \"none\", \"text\": null}}\n").as_bytes()),
            ("c.csv", b"image,caption,id\np/1.jpg,from csv,c1\np/1.jpg,,c2\np/1.jpg,again,c1\n"),
        ],
    );
    let mut sources = Vec::new();
    for name in ["a.tar", "b.jsonl", "c.csv"] {
        sources.extend(Source::find(dir.path().join(name).to_str().unwrap()).await.unwrap());
    }
    let filters = ella_dataset::Filters { max_caption_words: Some(1000), ..ella_dataset::Filters::new(32) };
    let settings = ella_dataset::Settings { filters, duplicates: ella_dataset::Duplicates::Keep, ..small() };
    let store = Store::open(out.path().to_str().unwrap()).unwrap();
    let report = prepare(&sources, &store, &settings, &PrepareOptions::default()).await.unwrap();
    let expected = [
        "caption_empty: c2",
        "caption_invalid: none",
        "caption_long: long",
        "duplicate_key: c1",
        "image_missing: p/2",
        "row_invalid: b/000000002",
    ];
    assert_eq!((refused(&report), report.kept, report.read), (expected.map(str::to_owned).to_vec(), 3, 9));
    assert_eq!(report.refused[&Refusal::RowInvalid], ["b/000000002"]);
}
