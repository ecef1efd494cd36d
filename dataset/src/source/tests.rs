//! Sources in stores that are no folders, and that fail.

use ella_store::faulty::{Failure, Faults};
use ella_store::{Operation, StoreError};

use super::*;

/// A source in a store whose failures are scripted, beside other files.
async fn source(faults: &Faults, name: &str, bytes: &[u8], others: &[(&str, &[u8])]) -> Source {
    let store = faults.inject(&Store::in_memory());
    for (name, bytes) in others.iter().chain([&(name, bytes)]) {
        store.put(name, bytes.to_vec().into()).await.unwrap();
    }
    let meta = store.head(name).await.unwrap().unwrap();
    let kind = match name.rsplit_once('.') {
        Some((_, "tar")) => SourceKind::Tar,
        Some((_, "csv")) => SourceKind::Csv,
        _ => SourceKind::Parquet,
    };
    let (options, within) = (SourceOptions::default(), Within::default());
    Source { store, key: name.into(), name: format!("memory://{name}"), bytes: meta.bytes, stamp: meta.stamp, kind, options, within }
}

async fn images(source: &Source) -> Result<Vec<Member>, DataError> {
    let (source, pieces) = (source.clone(), source.pieces().await?);
    let reading = tokio::task::spawn_blocking(move || {
        let mut images = Vec::new();
        for piece in &pieces {
            source.read(piece, &mut |sample| {
                images.push(sample.image);
                true
            })?;
        }
        Ok(images)
    });
    reading.await.unwrap()
}

fn data(bytes: &[u8]) -> Member {
    Member::Data(bytes.to_vec().into())
}

#[tokio::test]
async fn pictures_come_in_the_order_of_the_rows_however_they_were_fetched() {
    let faults = Faults::new();
    let names: Vec<String> = (0..100).map(|i| format!("p/{i}.jpg")).collect();
    let mut others: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), name.as_bytes())).collect();
    let large = vec![7; 20 << 20];
    others[50].1 = &large;
    let list = format!("path\n{}\n", names.join("\n"));
    let source = source(&faults, "list.csv", list.as_bytes(), &others).await;
    for name in ["p/3.jpg", "p/40.jpg"] {
        faults.push(Operation::Get, name, Failure::Before, 1);
    }
    faults.push(Operation::Get, "p/50.jpg", Failure::CutAt(9 << 20), 1);
    let expected: Vec<_> = others.iter().map(|(_, bytes)| data(bytes)).collect();
    assert!(images(&source).await.unwrap() == expected);
    assert!(faults.is_spent());
}

#[tokio::test]
async fn a_list_is_read_across_the_windows_in_which_it_is_fetched() {
    let long = "x".repeat(3 << 20);
    let rows: String = (0..5).map(|i| format!("{i}.jpg,\"{long}\"\n")).collect();
    let faults = Faults::new();
    let source = source(&faults, "list.csv", format!("path,caption\n{rows}").as_bytes(), &[("4.jpg", b"4")]).await;
    faults.push(Operation::Get, "list.csv", Failure::CutAt(1 << 20), 3);
    let expected = [Member::Absent, Member::Absent, Member::Absent, Member::Absent, data(b"4")];
    assert_eq!(images(&source).await.unwrap(), expected);
    assert!(faults.is_spent());
}

#[tokio::test]
async fn a_store_that_fails_is_no_broken_source() {
    let mut tar = ::tar::Builder::new(Vec::new());
    let mut header = ::tar::Header::new_gnu();
    header.set_size(1);
    tar.append_data(&mut header, "a.jpg", &b"x"[..]).unwrap();
    let tar = tar.into_inner().unwrap();
    let parquet = include_bytes!("../../tests/data/pictures.parquet");
    let cases: [(&str, &[u8], &str); 4] = [
        ("s.tar", &tar, "s.tar"),
        ("s.parquet", parquet, "s.parquet"),
        ("s.csv", b"path\n1.jpg\n", "s.csv"),
        ("s.csv", b"path\n1.jpg\n", "1.jpg"),
    ];
    for (name, bytes, denied) in cases {
        let faults = Faults::new();
        let source = source(&faults, name, bytes, &[("1.jpg", b"1")]).await;
        faults.push(Operation::Get, denied, Failure::Denied, u32::MAX);
        let error = images(&source).await.unwrap_err();
        let store = match &error {
            DataError::Store(store) => Some(store),
            DataError::Picture { source, .. } => Some(&**source),
            _ => None,
        };
        assert!(matches!(store, Some(StoreError::Permission { .. })), "{name}: {error}");
    }
    // A failure in the middle of the file, where the library reads.
    let faults = Faults::new();
    let source = source(&faults, "s.parquet", parquet, &[("beside.png", b"1")]).await;
    let pieces = source.pieces().await.unwrap();
    faults.push(Operation::Get, "s.parquet", Failure::Slow(std::time::Duration::ZERO), 2);
    faults.push(Operation::Get, "s.parquet", Failure::Denied, u32::MAX);
    let reading = tokio::task::spawn_blocking(move || source.read(&pieces[0], &mut |_| true));
    let error = reading.await.unwrap().unwrap_err();
    assert!(matches!(error, DataError::Store(StoreError::Permission { .. })), "{error}");
}

#[tokio::test]
async fn reading_stops_when_nobody_wants_more() {
    let parquet = include_bytes!("../../tests/data/pictures.parquet");
    for (name, bytes) in [("s.parquet", &parquet[..]), ("s.csv", b"path\n1.jpg\n2.jpg\n3.jpg\n4.jpg\n")] {
        let source = source(&Faults::new(), name, bytes, &[("1.jpg", b"1"), ("2.jpg", b"2")]).await;
        let pieces = source.pieces().await.unwrap();
        let reading = tokio::task::spawn_blocking(move || {
            let mut wanted = 2;
            let read = source.read(&pieces[0], &mut |_| {
                wanted -= 1;
                wanted > 0
            });
            (read, wanted)
        });
        let (read, wanted) = reading.await.unwrap();
        assert_eq!((read.unwrap(), wanted), (None, 0), "{name}");
    }
}
