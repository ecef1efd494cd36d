//! Parquet sources: what columns are taken for, and that damaged files are errors.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::sync::Arc;

use common::{jpeg, keys_and_captions, read, read_pieces, small, source, store, threads};
use ella_dataset::{CaptionColumn, DataError, Field, Member, Sample, Settings, Source, SourceKind, SourceOptions, prepare};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::metadata::ParquetMetaDataReader;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use proptest::prelude::*;
use tempfile::TempDir;

/// Made by pyarrow (make_parquet.py): two row groups of four rows, another packing in every column.
const PYARROW: &[u8] = include_bytes!("data/pictures.parquet");

/// The rows of a column.
type Cells<'a> = &'a [Option<&'a [u8]>];

/// Columns of bytes or texts, as `required|optional|repeated TYPE NAME` or a group of one, with what their rows hold; a row group for every `group`
/// rows.
fn parquet_of(columns: &[(&str, Cells)], group: usize) -> Vec<u8> {
    let schema: String = columns.iter().map(|(column, _)| format!("{column}{}", if column.ends_with('}') { " " } else { "; " })).collect();
    let schema = Arc::new(parse_message_type(&format!("message m {{ {schema} }}")).unwrap());
    let mut writer = SerializedFileWriter::new(Vec::new(), schema, Arc::new(WriterProperties::default())).unwrap();
    let rows = columns[0].1.len();
    for from in (0..rows).step_by(group) {
        let mut row_group = writer.next_row_group().unwrap();
        for (column, cells) in columns {
            let cells = &cells[from..rows.min(from + group)];
            let values: Vec<ByteArray> = cells.iter().flatten().map(|cell| cell.to_vec().into()).collect();
            let levels: Vec<i16> = cells.iter().map(|cell| i16::from(cell.is_some())).collect();
            let mut out = row_group.next_column().unwrap().unwrap();
            let levels = (!column.starts_with("required")).then_some(&levels[..]);
            let repeated = column.starts_with("repeated").then(|| vec![0; cells.len()]);
            out.typed::<ByteArrayType>().write_batch(&values, levels, repeated.as_deref()).unwrap();
            out.close().unwrap();
        }
        row_group.close().unwrap();
    }
    writer.into_inner().unwrap()
}

fn text(sample: &Sample, name: &str) -> Option<String> {
    match sample.fields.get(name) {
        Some(Field::Text(text)) => Some(text.clone()),
        _ => None,
    }
}

fn image(sample: &Sample) -> Option<&[u8]> {
    match &sample.image {
        Member::Data(bytes) => Some(bytes),
        _ => None,
    }
}

fn keys(samples: &[Sample]) -> String {
    samples.iter().map(|sample| sample.key.as_str()).collect::<Vec<_>>().join(" ")
}

#[tokio::test]
async fn a_field_within_a_group_is_named_by_its_path_and_one_of_a_list_is_an_error() {
    let (dir, picture) = (TempDir::new().unwrap(), jpeg(48, 1));
    let columns: [(&str, Cells); 4] = [
        ("required binary jpg", &[Some(&picture[..])]),
        ("required group meta { required binary long (UTF8); }", &[Some(b"a cup")]),
        ("required group dotted.a { required binary b.c (UTF8); }", &[Some(b"a jug")]),
        ("repeated binary tags (UTF8)", &[Some(b"x")]),
    ];
    let sources = [source(dir.path(), "p.parquet", &parquet_of(&columns, 1)).await];
    let prepared = async |field: &str| {
        let out = TempDir::new().unwrap();
        let captions = vec![CaptionColumn { name: "c".into(), field: Some(field.into()), weight: 1.0 }];
        let report = prepare(&sources, &store(&out), &Settings { captions, ..small() }, &threads(1)).await;
        report.map_err(|error| error.to_string()).map(|_| out)
    };
    for (field, caption) in [("meta.long", "a cup"), ("dotted.a.b.c", "a jug")] {
        let out = prepared(field).await.unwrap();
        assert_eq!(keys_and_captions(&out).await, [("p/000000000".to_owned(), vec![caption.to_owned()])]);
    }
    let error = prepared("tags.0").await.unwrap_err();
    assert!(error.contains("p.parquet: the field tags.0 lies in a list"), "{error}");
    let error = prepared("meta.none").await.unwrap_err();
    assert!(error.contains("its samples have: dotted.a.b.c, meta.long, tags;"), "{error}");
}

#[tokio::test]
async fn a_file_by_pyarrow_is_read_whatever_its_packing() {
    let dir = TempDir::new().unwrap();
    std::fs::write(dir.path().join("beside.png"), b"beside").unwrap();
    let source = source(dir.path(), "pictures.parquet", PYARROW).await;
    assert_eq!((source.kind(), source.stem()), (SourceKind::Parquet, "pictures"));
    let pieces = source.pieces().await.unwrap();
    assert_eq!((pieces.len(), pieces[0].rows.clone()), (1, 0..8));
    let (samples, _) = read_pieces(&source, &pieces).await.unwrap();
    // Keys are the integers, exact although no float holds them.
    assert_eq!(
        samples.iter().map(|s| s.key.parse::<u64>().unwrap()).collect::<Vec<_>>(),
        (0..8).map(|i| (1 << 60) + i).collect::<Vec<_>>()
    );
    for (i, sample) in samples.iter().enumerate() {
        match i {
            2 => assert_eq!(sample.image, Member::Absent),
            3 => assert_eq!(image(sample), Some(&b"beside"[..])),
            _ => {
                let picture = ella_dataset::decode_rgb(image(sample).unwrap()).unwrap();
                assert_eq!((&picture.0[..3], picture.1), (&[i as u8 * 30, 100, 200][..], 8));
            }
        }
        let caption = (i != 5).then(|| "a caption, again and again ".repeat(i + 1));
        assert_eq!(text(sample, "caption"), caption);
        assert_eq!(text(sample, "tag").as_deref(), Some(if i % 2 == 1 { "x" } else { "y" }));
        assert_eq!(sample.fields["aesthetic"], Field::Number(i as f64 / 4.0));
        assert_eq!(sample.fields["price"], Field::Number(i as f64 / 8.0));
        assert_eq!(sample.fields["small"], Field::Number(i as f64 / -2.0));
        assert_eq!(sample.fields["exact"], Field::Number(i as f64 / -4.0));
        for other in ["when", "safe", "tags"] {
            assert_eq!(sample.fields[other], Field::Other, "{other}");
        }
        assert!(!sample.fields.contains_key("image"), "the picture is no field");
    }
}

#[tokio::test]
async fn pictures_are_found_by_the_columns_names_and_types() {
    let dir = TempDir::new().unwrap();
    std::fs::write(dir.path().join("a.jpg"), b"file").unwrap();
    let (bytes, path): (Cells, Cells) = (&[Some(b"bytes")], &[Some(b"a.jpg")]);
    let cases: [(&[&str], &str, &str); 8] = [
        (&["required binary jpg", "required binary caption (UTF8)"], "bytes", "t/000000000"),
        (&["required binary image", "required binary file_name (UTF8)"], "bytes", "t/000000000"),
        (&["required binary image (UTF8)"], "file", "a"),
        (&["required binary caption (UTF8)", "required binary file_name (UTF8)"], "file", "a"),
        (&["required binary url (UTF8)", "required binary path (UTF8)", "required binary id (UTF8)"], "file", "a.jpg"),
        (&["required binary key (UTF8)"], "file", "a"),
        (&["optional binary png", "optional binary __key__ (UTF8)"], "bytes", "a.jpg"),
        (&["required binary webp", "required binary other"], "bytes", "t/000000000"),
    ];
    for (columns, picture, key) in cases {
        let columns: Vec<_> = columns.iter().map(|column| (*column, if column.contains("UTF8") { path } else { bytes })).collect();
        let samples = read(&source(dir.path(), "t.parquet", &parquet_of(&columns, 1)).await).await.unwrap();
        assert_eq!((image(&samples[0]).unwrap(), keys(&samples)), (picture.as_bytes(), key.to_owned()), "{columns:?}");
    }
    let none = parquet_of(&[("required binary caption (UTF8)", path), ("required binary mask", bytes)], 1);
    let error = source(dir.path(), "none.parquet", &none).await.pieces().await.unwrap_err();
    let DataError::SourceColumns { source_name, found, .. } = &error else { panic!("{error}") };
    assert!(source_name.ends_with("none.parquet") && found == "caption, mask", "{error}");
    let options = SourceOptions { image_column: Some("mask".into()), key_column: Some("caption".into()) };
    let found = Source::find_with(dir.path().join("none.parquet").to_str().unwrap(), &options).await.unwrap();
    let samples = read(&found[0]).await.unwrap();
    assert_eq!((image(&samples[0]), keys(&samples).as_str()), (Some(&b"bytes"[..]), "a.jpg"));
}

#[tokio::test]
async fn nulls_and_what_is_no_text_are_refused_row_by_row() {
    let dir = TempDir::new().unwrap();
    let long = vec![b'x'; (1 << 20) + 1];
    let columns: [(&str, Cells); 3] = [
        ("optional binary jpg", &[Some(b"1"), None, Some(b"3"), Some(b""), Some(b"5")]),
        ("optional binary caption (UTF8)", &[None, Some(b"two"), Some(b"\xff"), Some(b""), Some(&long)]),
        ("optional binary key (UTF8)", &[Some(b"k1"), Some(b"k\xff"), None, Some(b""), Some(b"k1")]),
    ];
    for group in [1, 2, 5] {
        let samples = read(&source(dir.path(), "n.parquet", &parquet_of(&columns, group)).await).await.unwrap();
        assert_eq!(keys(&samples), "k1 k\u{fffd} n/000000002 n/000000003 k1");
        assert_eq!(samples.iter().map(|s| s.key_is_utf8).collect::<Vec<_>>(), [true, false, true, true, true]);
        assert_eq!(samples.iter().map(image).collect::<Vec<_>>(), [Some(&b"1"[..]), None, Some(b"3"), Some(b""), Some(b"5")]);
        let captions: Vec<_> = samples.iter().map(|sample| sample.fields["caption"].clone()).collect();
        assert_eq!(captions, [Field::Other, Field::Text("two".into()), Field::NotUtf8, Field::Text(String::new()), Field::TooLong]);
    }
}

#[tokio::test]
async fn a_list_of_pictures_may_be_a_parquet_file() {
    let dir = TempDir::new().unwrap();
    let names: Vec<String> = (0..200).map(|i| format!("{i:03}.jpg")).collect();
    let cells: Vec<_> = names.iter().map(|name| Some(name.as_bytes())).collect();
    for name in &names {
        std::fs::write(dir.path().join(name), name).unwrap();
    }
    std::fs::write(dir.path().join("metadata.parquet"), parquet_of(&[("required binary file_name (UTF8)", &cells)], 70)).unwrap();
    let found = Source::find(dir.path().to_str().unwrap()).await.unwrap();
    let samples = read(&found[0]).await.unwrap();
    assert_eq!(
        samples.iter().map(|sample| image(sample).unwrap()).collect::<Vec<_>>(),
        names.iter().map(String::as_bytes).collect::<Vec<_>>()
    );
}

#[tokio::test]
async fn files_that_are_no_whole_parquet_are_errors_that_name_them() {
    let dir = TempDir::new().unwrap();
    let mut encrypted = PYARROW.to_vec();
    let end = encrypted.len();
    encrypted[end - 1] = b'E';
    let mut footer = PYARROW.to_vec();
    footer[end - 8..end - 4].copy_from_slice(&u32::MAX.to_le_bytes());
    let mut page = PYARROW.to_vec();
    let meta = ParquetMetaDataReader::new().parse_and_finish(&bytes::Bytes::from_static(PYARROW)).unwrap();
    let (start, len) = meta.row_group(0).column(3).byte_range();
    page[(start + len) as usize - 1] ^= 1;
    let empty = parquet_of(&[("required binary jpg", &[])], 1);
    let cases: [(&str, &[u8], &str); 7] = [
        ("empty", b"", "truncated"),
        ("text", b"this is no Parquet file", "PAR1"),
        ("cut", &PYARROW[..end / 2], "PAR1"),
        ("encrypted", &encrypted, "encrypted"),
        ("footer", &footer, "footer"),
        ("page", &page, "row group 0, column caption: a page's checksum is wrong"),
        ("rows", &empty, "holds no rows"),
    ];
    for (name, bytes, says) in cases {
        let error = read(&source(dir.path(), &format!("{name}.parquet"), bytes).await).await.unwrap_err();
        let DataError::SourceCorrupt { source_name, what, .. } = &error else { panic!("{name}: {error}") };
        assert!(source_name.ends_with(&format!("{name}.parquet")) && what.contains(says), "{name}: {error}");
    }
}

fn changed(bytes: &[u8], edits: &[(f64, u8)], cut: Option<f64>) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for (at, to) in edits {
        let at = (at * bytes.len() as f64) as usize;
        bytes[at] = *to;
    }
    if let Some(cut) = cut {
        bytes.truncate((cut * bytes.len() as f64) as usize);
    }
    bytes
}

/// Reads a source from damaged bytes: samples or an error that names the file, whatever they are.
fn survives(name: &str, bytes: &[u8]) {
    let dir = TempDir::new().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let result = runtime.block_on(async { read(&source(dir.path(), name, bytes).await).await });
    if let Err(error) = result {
        let text = error.to_string();
        assert!(text.contains(name) || matches!(error, DataError::Store(_)), "{text}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_parquets_never_crash(
        pyarrow: bool,
        footer: bool,
        edits in prop::collection::vec((0.0f64..1.0, any::<u8>()), 1..4),
        cut in prop::option::weighted(0.1, 0.0f64..1.0),
    ) {
        let columns: [(&str, Cells); 2] =
            [("optional binary jpg", &[Some(b"one"), None, Some(b"three")]), ("required binary key (UTF8)", &[Some(b"a"), Some(b"b"), Some(b"a")])];
        let ours = parquet_of(&columns, 2);
        let whole = if pyarrow { PYARROW } else { &ours };
        let edits: Vec<_> = edits.into_iter().map(|(at, to)| (if footer { 1.0 - at * 0.4 - 1e-9 } else { at }, to)).collect();
        survives("x.parquet", &changed(whole, &edits, cut));
    }

    #[test]
    fn damaged_tars_and_lists_never_crash(
        kind in 0..4usize,
        edits in prop::collection::vec((0.0f64..1.0, prop_oneof![any::<u8>(), Just(b'"'), Just(b'\n'), Just(b'/')]), 1..6),
        cut in prop::option::weighted(0.2, 0.0f64..1.0),
    ) {
        let tar = common::tar_of(&[("a.jpg", b"A"), ("a.json", br#"{"caption": "c"}"#), ("b.txt", b"text")]);
        let json = br#"{"file_name": "a.jpg", "caption": "c", "score": 1.5}
{"file_name": "dir/b.jpg", "caption": "d", "score": -2}
"#;
        let csv = b"file_name,caption\na.jpg,\"one, two\"\nb/c.jpg,\"say \"\"no\"\"\"\n";
        let array = br#"[{"file_name": "a.jpg", "caption": "c"}, {"file_name": "dir/b.jpg", "turns": [{"score": -2}]}]"#;
        let (name, whole): (_, &[u8]) = [("x.tar", &tar[..]), ("x.jsonl", json), ("x.csv", csv), ("x.json", array)][kind];
        survives(name, &changed(whole, &edits, cut));
    }
}
