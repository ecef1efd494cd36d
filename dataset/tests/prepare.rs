//! Preparing tars: what is kept, what is refused why, and that the bytes depend on nothing else.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::sync::{Arc, Mutex};

use common::{files, good_tar, jpeg, png, png_alpha, refused, small, sources, store, tar_of, threads, webp};
use ella_dataset::{
    CaptionColumn, DataError, DataSet, Duplicates, Encoding, Filters, LatentEncoder, LatentSpec, Manifest, Plan, Preparation,
    PrepareOptions, Row, Settings, ShardLayout, ShardReader, ShardWriter, Source, decode_rgb, prepare,
};
use ella_store::{Digest, Store};
use half::f16;
use tempfile::TempDir;

#[tokio::test]
async fn keeps_good_samples_of_every_kind_in_the_order_of_the_sources() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let first = tar_of(&[
        ("a/one.jpg", &jpeg(48, 1)),
        ("a/one.txt", b"  one picture \n"),
        ("a/two.PNG", &png(64, 40, 2)),
        ("a/two.json", br#"{"caption": "two pictures", "width": 64}"#),
    ]);
    let second = tar_of(&[("b.webp", &webp(40, 80, 3)), ("b.txt", b"three"), ("b.json", br#"{"caption": "not this"}"#)]);
    let sources = sources(dir.path(), &[("1.tar", &first), ("0.tar", &second)]).await;
    let report = prepare(&sources, &store(&out), &small(), &threads(2)).await.unwrap();
    assert_eq!((report.read, report.kept, refused(&report)), (3, 3, vec![]));

    let data = DataSet::open(out.path().to_str().unwrap()).await.unwrap();
    assert_eq!((data.manifest().samples, data.manifest().resolution()), (3, Some(32)));
    let mut rows = Vec::new();
    for i in 0..data.manifest().shards.len() {
        let shard = data.shard(i).await.unwrap();
        for row in shard.iter() {
            let (rgb, width, height) = decode_rgb(row.image.unwrap()).unwrap();
            assert_eq!((width, height, rgb.len()), (32, 32, 32 * 32 * 3));
            assert_eq!(row.moments, None);
            rows.push((row.key.to_owned(), row.caption.to_owned(), row.original.unwrap(), row.crop.unwrap()));
        }
    }
    let row = |key: &str, caption: &str, original, crop| (key.to_owned(), caption.to_owned(), original, crop);
    let expected = vec![
        row("a/one", "one picture", (48, 48), (0, 0)),
        row("a/two", "two pictures", (64, 40), (9, 0)),
        row("b", "three", (40, 80), (0, 16)),
    ];
    assert_eq!(rows, expected);
}

#[tokio::test]
async fn every_refused_sample_is_counted_with_its_reason() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let good = jpeg(48, 1);
    let cut = &good[..good.len() * 2 / 3];
    // The header of a JPEG claims a size; this one claims 65500 × 65500 pixels.
    let mut lying = good.clone();
    let frame = lying.windows(2).position(|w| w == [0xff, 0xc0]).unwrap();
    lying[frame + 5..frame + 9].copy_from_slice(&[0xff, 0xdc, 0xff, 0xdc]);
    let text: &[u8] = b"three words here";
    let members: Vec<(&str, &[u8])> = vec![
        ("good.jpg", &good),
        ("good.txt", text),
        ("broken.jpg", cut),
        ("broken.txt", text),
        ("zero.jpg", b""),
        ("zero.txt", text),
        ("noise.png", b"this is no picture"),
        ("noise.txt", text),
        ("lying.jpg", &lying),
        ("lying.txt", text),
        ("no_text.jpg", &good),
        ("no_image.txt", text),
        ("empty.jpg", &good),
        ("empty.txt", b" \n"),
        ("latin.jpg", &good),
        ("latin.txt", b"caf\xe9 au lait"),
        ("short.jpg", &good),
        ("short.txt", b"short"),
        ("long.jpg", &good),
        ("long.txt", b"one two three four five six"),
        ("json.jpg", &good),
        ("json.json", b"{\"caption\": "),
        ("number.jpg", &good),
        ("number.json", b"{\"caption\": 7}"),
        ("field.jpg", &good),
        ("field.json", b"{\"words\": \"three words here\"}"),
        ("good.jpg", &good),
        ("good.txt", text),
        ("again.jpg", &good),
        ("again.txt", text),
        ("again.jpg", &good),
        ("again.txt", text),
        ("__meta.json", b"{}"),
        (".hidden.jpg", b""),
        ("README", b"no dot, no sample"),
    ];
    let small_picture = png(64, 31, 1);
    let mut members = members;
    members.push(("small.png", &small_picture));
    members.push(("small.txt", text));
    let sources = sources(dir.path(), &[("s.tar", &tar_of(&members))]).await;
    let filters = Filters { min_caption_words: 2, max_caption_words: Some(5), ..Filters::new(32) };
    let settings = Settings { filters, duplicates: Duplicates::Keep, ..small() };
    let report = prepare(&sources, &store(&out), &settings, &threads(1)).await.unwrap();
    let expected = [
        "caption_empty: empty",
        "caption_invalid: json number",
        "caption_long: long",
        "caption_missing: no_text field",
        "caption_not_utf8: latin",
        "caption_short: short",
        "duplicate_key: good again",
        "image_missing: no_image",
        "image_too_large: lying",
        "image_undecodable: broken zero noise",
        "min_edge: small",
    ];
    assert_eq!(refused(&report), expected);
    assert_eq!((report.read, report.kept, report.adds_up()), (18, 2, true));
    let written: ella_dataset::Report = serde_json::from_slice(&std::fs::read(out.path().join("report.json")).unwrap()).unwrap();
    assert_eq!(written, report);
    let manifest = Manifest::load(&store(&out)).await.unwrap();
    assert_eq!(manifest.sources[0].ignored, 3);
}

#[tokio::test]
async fn captions_come_from_the_field_named() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let tar = tar_of(&[("a.jpg", &jpeg(40, 1)), ("a.txt", b"from txt"), ("a.json", br#"{"caption": "c", "long": "from long"}"#)]);
    let sources = sources(dir.path(), &[("s.tar", &tar)]).await;
    let settings = Settings { captions: vec!["long".parse().unwrap()], ..small() };
    prepare(&sources, &store(&out), &settings, &threads(1)).await.unwrap();
    let data = DataSet::open(out.path().to_str().unwrap()).await.unwrap();
    assert_eq!(data.shard(0).await.unwrap().row(0).unwrap().caption, "from long");
}

#[tokio::test]
async fn transparent_pixels_become_white_and_grey_becomes_rgb() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let mut grey = std::io::Cursor::new(Vec::new());
    image::GrayImage::from_pixel(40, 40, image::Luma([70])).write_to(&mut grey, image::ImageFormat::Png).unwrap();
    let tar =
        tar_of(&[("clear.png", &png_alpha(40, [200, 0, 0, 0])), ("clear.txt", b"c"), ("grey.png", grey.get_ref()), ("grey.txt", b"g")]);
    let sources = sources(dir.path(), &[("s.tar", &tar)]).await;
    prepare(&sources, &store(&out), &small(), &threads(1)).await.unwrap();
    let data = DataSet::open(out.path().to_str().unwrap()).await.unwrap();
    let shard = data.shard(0).await.unwrap();
    let pixel = |row: usize| decode_rgb(shard.row(row).unwrap().image.unwrap()).unwrap().0[..3].to_vec();
    assert_eq!((pixel(0), pixel(1)), (vec![255; 3], vec![70; 3]));
}

#[tokio::test]
async fn bytes_do_not_depend_on_threads_nor_on_where_preparing_was_cut_off() {
    let dir = TempDir::new().unwrap();
    let tars = [("a.tar", good_tar(0, 23)), ("b.tar", good_tar(100, 40)), ("c.tar", good_tar(200, 1))];
    let tars: Vec<_> = tars.iter().map(|(name, bytes)| (*name, bytes.as_slice())).collect();
    let sources = sources(dir.path(), &tars).await;
    let one = TempDir::new().unwrap();
    prepare(&sources, &store(&one), &small(), &threads(1)).await.unwrap();
    let expected = files(one.path());
    assert!(expected.iter().filter(|(name, _)| name.starts_with("shards/00001-")).count() > 2, "several shards a source");

    let other = TempDir::new().unwrap();
    prepare(&sources, &store(&other), &small(), &threads(3)).await.unwrap();
    assert_eq!(files(other.path()), expected);

    // Whatever prefix of the written files an interruption leaves, preparing again completes it to the same bytes.
    let gone: [fn(&str) -> bool; 5] = [
        |name| name == "manifest.json",
        |name| name == "manifest.json" || name == "report.json",
        |name| !name.starts_with("shards/") && name != "plan.json",
        |name| name.contains("00001-") && (name.ends_with("1.arrow") || name.ends_with("json")) || name == "manifest.json",
        |name| name != "plan.json",
    ];
    for gone in gone {
        for (name, _) in expected.iter().filter(|(name, _)| gone(name)) {
            std::fs::remove_file(other.path().join(name)).unwrap();
        }
        let report = prepare(&sources, &store(&other), &small(), &threads(2)).await.unwrap();
        assert_eq!(report.kept, 64);
        assert_eq!(files(other.path()), expected);
    }
    // And once more on the finished one.
    prepare(&sources, &store(&other), &small(), &threads(2)).await.unwrap();
    assert_eq!(files(other.path()), expected);
}

#[tokio::test]
async fn a_finished_source_is_not_read_again() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let sources = sources(dir.path(), &[("a.tar", &good_tar(0, 5)), ("b.tar", &good_tar(50, 5))]).await;
    prepare(&sources, &store(&out), &small(), &threads(1)).await.unwrap();
    std::fs::remove_file(out.path().join("manifest.json")).unwrap();
    std::fs::remove_file(dir.path().join("a.tar")).unwrap();
    assert_eq!(prepare(&sources, &store(&out), &small(), &threads(1)).await.unwrap().kept, 10);
}

#[tokio::test]
async fn a_shard_that_was_lost_is_named_and_made_again() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let sources = sources(dir.path(), &[("a.tar", &good_tar(0, 5)), ("b.tar", &good_tar(50, 5))]).await;
    prepare(&sources, &store(&out), &small(), &threads(1)).await.unwrap();
    let whole = files(out.path());
    let data = DataSet::open(out.path().to_str().unwrap()).await.unwrap();
    let lost = data.manifest().shards[1].name.clone();
    std::fs::remove_file(out.path().join(&lost)).unwrap();
    let error = data.shard(1).await.unwrap_err().to_string();
    assert!(error.contains(&lost) && error.contains("not found") && error.contains("ella prepare"), "{error}");
    prepare(&sources, &store(&out), &small(), &threads(2)).await.unwrap();
    assert_eq!(files(out.path()), whole);
}

#[tokio::test]
async fn a_destination_with_other_data_is_refused_and_left_alone() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let one = sources(dir.path(), &[("a.tar", &good_tar(0, 5))]).await;
    prepare(&one, &store(&out), &small(), &threads(1)).await.unwrap();
    let before = files(out.path());
    let field = |result: Result<_, DataError>| match result.unwrap_err() {
        DataError::Other { file, field, expected, found } => (file.rsplit('/').next().unwrap().to_owned(), field, expected, found),
        error => panic!("{error}"),
    };
    let settings = Settings { encoding: Encoding::Jpeg { quality: 80 }, ..small() };
    let found = field(prepare(&one, &store(&out), &settings, &threads(1)).await);
    assert_eq!(found, ("plan.json".into(), "settings.encoding.quality".into(), "80".into(), "95".into()));
    let two = sources(dir.path(), &[("a.tar", &good_tar(0, 5)), ("b.tar", &good_tar(9, 5))]).await;
    let (_, what, expected, found) = field(prepare(&two, &store(&out), &small(), &threads(1)).await);
    assert_eq!((what, expected, found), ("sources".into(), "2 sources, with \"b.tar\"".into(), "1 source".into()));
    // Another file of the same name is another source.
    let changed = sources(dir.path(), &[("a.tar", &good_tar(700, 9))]).await;
    let error = prepare(&changed, &store(&out), &small(), &threads(1)).await.unwrap_err();
    assert!(matches!(&error, DataError::SourceReplaced { source_name, .. } if source_name.ends_with("a.tar")), "{error}");
    assert_eq!(files(out.path()), before);
}

#[tokio::test]
async fn a_runs_folder_is_no_destination() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    std::fs::write(out.path().join("run.toml"), "").unwrap();
    let before = files(out.path());
    let one = sources(dir.path(), &[("a.tar", &good_tar(0, 5))]).await;
    let error = prepare(&one, &store(&out), &small(), &threads(1)).await.unwrap_err();
    assert!(error.to_string().contains("holds something else: a run (run.toml is there)") && error.is_permanent(), "{error}");
    let captions = ella_dataset::Captions { kept: vec![("a".into(), "b".into())], ..Default::default() };
    let error = ella_dataset::prepare_captions(captions, "c", &store(&out)).await.unwrap_err();
    assert!(matches!(error, DataError::HoldsRun { .. }), "{error}");
    assert_eq!(files(out.path()), before);
}

#[tokio::test]
async fn broken_tars_are_errors_that_name_file_and_place_and_a_whole_one_goes_on() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let whole = good_tar(0, 12);
    let mut header = whole.clone();
    let second = 1024 + jpeg(40, 0).len().div_ceil(512) * 512 + 512;
    header[second + 4] ^= 1;
    let no_end = &whole[..whole.len() - 1024];
    let cases: [(&str, &[u8], &str); 6] = [
        ("cut.tar", &whole[..whole.len() / 2], "truncated"),
        ("no_end.tar", no_end, "truncated"),
        ("header.tar", &header, "corrupt"),
        ("empty.tar", b"", "empty"),
        ("text.tar", &b"not a tar at all ".repeat(100), "not a plain tar"),
        ("nothing.tar", &[0; 1024], "no files"),
    ];
    for (name, bytes, says) in cases {
        let sources = sources(dir.path(), &[("first.tar", &good_tar(500, 3)), (name, bytes)]).await;
        let out = TempDir::new().unwrap();
        let error = prepare(&sources, &store(&out), &small(), &threads(1)).await.unwrap_err();
        let DataError::SourceCorrupt { source_name, what, offset } = &error else { panic!("{name}: {error}") };
        assert!(source_name.ends_with(name) && what.contains(says) && *offset <= bytes.len() as u64, "{name}: {error}");
        assert!(!out.path().join("manifest.json").exists());
        assert!(std::fs::read_dir(out.path().join("units")).unwrap().count() == 1, "the whole source is done");
    }
    // The broken file is replaced by the whole one; the same call goes on.
    let broken = sources(dir.path(), &[("x.tar", &whole[..whole.len() / 2])]).await;
    prepare(&broken, &store(&out), &small(), &threads(1)).await.unwrap_err();
    let fixed = sources(dir.path(), &[("x.tar", &whole)]).await;
    assert_eq!(prepare(&fixed, &store(&out), &small(), &threads(1)).await.unwrap().kept, 12);
}

#[tokio::test]
async fn sources_that_are_not_there_are_named() {
    let dir = TempDir::new().unwrap();
    for missing in ["none.tar", "folder/none.tar", "folder", ""] {
        let location = dir.path().join(missing).to_str().unwrap().to_owned();
        let error = Source::find(&location).await.unwrap_err();
        assert!(matches!(&error, DataError::SourceMissing { source_name } if *source_name == location), "{error}");
    }
    let error = prepare(&[], &store(&dir), &small(), &threads(1)).await.unwrap_err();
    assert!(matches!(error, DataError::SourceMissing { .. }));
}

#[tokio::test]
async fn a_folder_stands_for_its_tars_by_name() {
    let dir = TempDir::new().unwrap();
    sources(dir.path(), &[("b.tar", &good_tar(0, 1)), ("a.tar", &good_tar(1, 1))]).await;
    std::fs::write(dir.path().join("c.txt"), b"").unwrap();
    std::fs::create_dir(dir.path().join("deeper")).unwrap();
    sources(&dir.path().join("deeper"), &[("d.tar", &good_tar(2, 1))]).await;
    let found = Source::find(dir.path().to_str().unwrap()).await.unwrap();
    assert_eq!(found.iter().map(Source::file_name).collect::<Vec<_>>(), ["a.tar", "b.tar"]);
}

#[tokio::test]
async fn a_key_in_two_sources_is_an_error_naming_both_unless_keys_are_prefixed() {
    let (dir, out, prefixed) = (TempDir::new().unwrap(), TempDir::new().unwrap(), TempDir::new().unwrap());
    let sources = sources(dir.path(), &[("a.tar", &good_tar(0, 3)), ("b.tar", &good_tar(2, 3))]).await;
    let error = prepare(&sources, &store(&out), &small(), &threads(1)).await.unwrap_err();
    let DataError::DuplicateKey { key, first, second, hint } = &error else { panic!("{error}") };
    assert_eq!((key.as_str(), first.as_str(), second.as_str()), ("000002", sources[0].name(), sources[1].name()));
    assert!(hint.contains("--key-prefix"), "{error}");
    assert!(!out.path().join("manifest.json").exists());

    // Where the first ones are alike, that is told while nothing is prepared yet, and the destination is free.
    let (other, free) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let alike = [&sources[..1], &common::sources(other.path(), &[("a.tar", &good_tar(0, 3))]).await].concat();
    let error = prepare(&alike, &store(&free), &small(), &threads(1)).await.unwrap_err();
    let DataError::DuplicateKey { key, first, second, .. } = &error else { panic!("{error}") };
    assert_eq!((key.as_str(), first.as_str(), second.as_str()), ("000000", alike[0].name(), alike[1].name()));
    assert_eq!(files(free.path()), vec![]);
    let renamed = [&sources[..1], &common::sources(other.path(), &[("c.tar", &good_tar(0, 1))]).await].concat();
    let error = prepare(&renamed, &store(&free), &small(), &threads(1)).await.unwrap_err();
    assert!(matches!(&error, DataError::DuplicateKey { key, .. } if key == "000000"), "{error}");
    assert_eq!(files(free.path()), vec![]);
    let settings = Settings { key_prefix: true, duplicates: Duplicates::Keep, ..small() };
    assert_eq!(prepare(&alike, &store(&free), &settings, &threads(1)).await.unwrap().kept, 6);
    // Nor are first samples compared that are not kept.
    let (third, none) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let broken = tar_of(&[("000000.jpg", b"no picture"), ("000000.txt", b"a cup"), ("9.jpg", &jpeg(48, 9)), ("9.txt", b"a cup")]);
    let alike = [&sources[..1], &common::sources(third.path(), &[("a.tar", &broken)]).await].concat();
    assert_eq!(prepare(&alike, &store(&none), &small(), &threads(1)).await.unwrap().kept, 4);

    // They share a picture too.
    let settings = Settings { key_prefix: true, duplicates: Duplicates::Keep, ..small() };
    assert_eq!(prepare(&sources, &store(&prefixed), &settings, &threads(1)).await.unwrap().kept, 6);
    let data = DataSet::open(prefixed.path().to_str().unwrap()).await.unwrap();
    assert_eq!(data.shard(0).await.unwrap().row(0).unwrap().key, "a/000000");
}

#[tokio::test]
async fn prefixes_of_sources_with_the_same_name_have_their_folders_too() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let mut all = Vec::new();
    for (name, from) in [("x/cc3m/0.tar", 0), ("x/cc12m/0.tar", 50), ("x/1.tar", 0)] {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, good_tar(from, 2)).unwrap();
        all.extend(Source::find(path.to_str().unwrap()).await.unwrap());
    }
    let settings = Settings { key_prefix: true, duplicates: Duplicates::Keep, ..small() };
    assert_eq!(prepare(&all, &store(&out), &settings, &threads(1)).await.unwrap().kept, 6);
    let keys = |rows: Vec<common::Prepared>| rows.into_iter().map(|row| row.key).collect::<Vec<_>>();
    let expected = ["cc3m/0/000000", "cc3m/0/000001", "cc12m/0/000050", "cc12m/0/000051", "1/000000", "1/000001"];
    assert_eq!(keys(common::prepared_rows(&out).await), expected);
    // Elsewhere, but in folders of the same names, they are the same sources.
    let moved = dir.path().join("y");
    std::fs::rename(dir.path().join("x"), &moved).unwrap();
    let mut there = Vec::new();
    for name in ["cc3m/0.tar", "cc12m/0.tar", "1.tar"] {
        there.extend(Source::find(moved.join(name).to_str().unwrap()).await.unwrap());
    }
    assert_eq!(prepare(&there, &store(&out), &settings, &threads(1)).await.unwrap().kept, 6);

    // Side by side, their endings tell them apart.
    let (out, list) = (TempDir::new().unwrap(), moved.join("1.csv"));
    std::fs::write(moved.join("p.jpg"), jpeg(50, 1)).unwrap();
    std::fs::write(&list, "file_name,key,text\np.jpg,000000,a picture\n").unwrap();
    let beside = [there[2].clone(), Source::find(list.to_str().unwrap()).await.unwrap().remove(0)];
    prepare(&beside, &store(&out), &settings, &threads(1)).await.unwrap();
    assert_eq!(keys(common::prepared_rows(&out).await), ["1.tar/000000", "1.tar/000001", "1.csv/000000"]);
}

#[tokio::test]
async fn nothing_kept_is_an_error_and_still_reported() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let sources = sources(dir.path(), &[("a.tar", &good_tar(0, 3))]).await;
    let settings = Settings { filters: Filters { min_caption_words: 50, ..Filters::new(32) }, ..small() };
    let error = prepare(&sources, &store(&out), &settings, &threads(1)).await.unwrap_err();
    assert!(matches!(&error, DataError::NothingKept { read: 3, refused } if refused == "3 caption_short"), "{error}");
    assert!(out.path().join("report.json").exists() && !out.path().join("manifest.json").exists());
    // Who loosens the filters, as the message says, may go on there, and nothing of the first try is left.
    assert_eq!(prepare(&sources, &store(&out), &small(), &threads(1)).await.unwrap().kept, 3);
    assert_eq!(out.path().join("units").read_dir().unwrap().count(), 1);
}

#[tokio::test]
async fn only_a_destination_without_shards_is_given_up() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let two = sources(dir.path(), &[("a.tar", &good_tar(0, 3)), ("b.tar", &good_tar(0, 3)[..2000])]).await;
    prepare(&two, &store(&out), &small(), &threads(1)).await.unwrap_err();
    let before = files(out.path());
    Plan::withdraw(&store(&out)).await.unwrap();
    assert_eq!(files(out.path()), before);
    let (one, out) = (&two[1..], TempDir::new().unwrap());
    prepare(one, &store(&out), &small(), &threads(1)).await.unwrap_err();
    Plan::withdraw(&store(&out)).await.unwrap();
    assert!(files(out.path()).is_empty());
}

#[tokio::test]
async fn settings_out_of_range_are_refused_by_name() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let sources = sources(dir.path(), &[("a.tar", &good_tar(0, 1))]).await;
    let filters = |change: fn(&mut Filters)| {
        let mut settings = small();
        change(&mut settings.filters);
        settings
    };
    let cases = [
        ("resolution", Settings { resolution: 33, ..small() }),
        ("min_edge", filters(|f| f.min_edge = 0)),
        ("max_caption_words", filters(|f| (f.min_caption_words, f.max_caption_words) = (9, Some(8)))),
        ("quality", Settings { encoding: Encoding::Jpeg { quality: 101 }, ..small() }),
        ("shard_bytes", Settings { shard_bytes: 0, ..small() }),
        ("max_pixels", filters(|f| f.max_pixels = 0)),
        ("caption", Settings { captions: vec![CaptionColumn { field: Some(String::new()), ..CaptionColumn::default() }], ..small() }),
        ("images", Settings { images: false, ..small() }),
    ];
    for (name, settings) in cases {
        let error = prepare(&sources, &store(&out), &settings, &threads(1)).await.unwrap_err();
        assert!(matches!(&error, DataError::Setting { field, .. } if *field == name), "{name}: {error}");
    }
    assert_eq!(files(out.path()), vec![]);
}

#[tokio::test]
async fn a_part_tells_what_became_of_its_samples_so_far() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let sources = sources(dir.path(), &[("a.tar", &good_tar(0, 40))]).await;
    let seen = Arc::new(Mutex::new(Vec::new()));
    let watch = Arc::clone(&seen);
    let preparation = Preparation::new(sources, small(), threads(1), store(&out)).unwrap();
    assert_eq!(preparation.plan().await.unwrap().parts, [0]);
    let record = preparation.part(0, Box::new(move |report| watch.lock().unwrap().push(report.clone()))).await.unwrap();
    let seen = seen.lock().unwrap();
    assert_eq!(seen.last(), Some(&record.report));
    assert!(seen.is_sorted_by_key(|report| report.read) && seen.len() > 2);
}

#[tokio::test]
async fn a_shard_left_by_another_machine_stands_if_it_holds_the_same_samples() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let sources = sources(dir.path(), &[("a.tar", &good_tar(0, 4))]).await;
    prepare(&sources, &store(&out), &small(), &threads(1)).await.unwrap();
    let manifest = Manifest::load(&store(&out)).await.unwrap();
    let path = out.path().join(&manifest.shards[0].name);
    let layout = ShardLayout { pictures: true, images: true, ..ShardLayout::default() };
    let rewrite = |change: fn(&mut Row)| {
        let reader = ShardReader::open("shard", std::fs::read(&path).unwrap().into(), layout.clone()).unwrap();
        let mut writer = ShardWriter::new(layout.clone()).unwrap();
        for row in reader.iter() {
            let (key, captions, image) = (row.key.into(), vec![row.caption.into()], row.image.unwrap().to_vec());
            let mut row = Row { key, captions, image, original: row.original.unwrap(), crop: row.crop.unwrap(), ..Row::default() };
            change(&mut row);
            writer.push(row).unwrap();
        }
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, writer.finish().unwrap()).unwrap();
        std::fs::remove_file(out.path().join("manifest.json")).unwrap();
        std::fs::remove_dir_all(out.path().join("units")).unwrap();
    };
    rewrite(|row| row.image.push(0));
    prepare(&sources, &store(&out), &small(), &threads(1)).await.unwrap();
    let stands = Manifest::load(&store(&out)).await.unwrap();
    assert_ne!(stands.digest(), manifest.digest());
    DataSet::open(out.path().to_str().unwrap()).await.unwrap().shard(0).await.unwrap();

    rewrite(|row| row.captions[0].push('!'));
    let error = prepare(&sources, &store(&out), &small(), &threads(1)).await.unwrap_err();
    assert!(matches!(&error, DataError::Digest { file, .. } if file.ends_with(&manifest.shards[0].name)), "{error}");
}

/// Moments that tell which picture they were made of: its mean brightness, everywhere.
struct Mean {
    batches: Mutex<Vec<usize>>,
}

impl LatentEncoder for Mean {
    fn spec(&self) -> LatentSpec {
        LatentSpec { model: Digest::of(b"mean"), channels: 8, downscale: 8 }
    }

    fn batch(&self) -> usize {
        4
    }

    fn encode(&self, rgb: &[u8], count: usize, size: (u32, u32)) -> Result<Vec<f16>, Box<dyn std::error::Error + Send + Sync>> {
        self.batches.lock().unwrap().push(count);
        assert_eq!(rgb.len(), count * (size.0 * size.1 * 3) as usize);
        let mean = |picture: &[u8]| f16::from_f32(picture.iter().map(|&b| f32::from(b)).sum::<f32>() / picture.len() as f32);
        Ok(rgb.chunks_exact(rgb.len() / count).flat_map(|picture| vec![mean(picture); 128]).collect())
    }
}

#[tokio::test]
async fn latents_lie_beside_or_instead_of_images() {
    let dir = TempDir::new().unwrap();
    let sources = sources(dir.path(), &[("a.tar", &good_tar(0, 10))]).await;
    for images in [true, false] {
        let (out, encoder) = (TempDir::new().unwrap(), Arc::new(Mean { batches: Mutex::default() }));
        let settings = Settings { images, ..small() };
        let options = PrepareOptions { threads: 2, latents: Some(encoder.clone()), ..PrepareOptions::default() };
        prepare(&sources, &store(&out), &settings, &options).await.unwrap();
        assert_eq!(*encoder.batches.lock().unwrap(), [4, 4, 2]);
        let data = DataSet::open(out.path().to_str().unwrap()).await.unwrap();
        assert_eq!(data.manifest().latents, Some(encoder.spec()));
        for i in 0..data.manifest().shards.len() {
            let shard = data.shard(i).await.unwrap();
            for row in shard.iter() {
                let moments = row.moments.unwrap();
                assert!(moments.len() == 128 && moments.iter().all(|m| *m == moments[0]));
                assert_eq!(row.image.is_some(), images);
                if let Some(image) = row.image {
                    let rgb = decode_rgb(image).unwrap().0;
                    let mean = rgb.iter().map(|&b| f32::from(b)).sum::<f32>() / rgb.len() as f32;
                    assert!((mean - moments[0].to_f32()).abs() < 1.0);
                }
            }
        }
    }
}

#[tokio::test]
async fn an_encoder_of_the_wrong_shape_is_an_error() {
    struct Wrong;
    impl LatentEncoder for Wrong {
        fn spec(&self) -> LatentSpec {
            LatentSpec { model: Digest::of(b""), channels: 8, downscale: 8 }
        }
        fn batch(&self) -> usize {
            2
        }
        fn encode(&self, _: &[u8], _: usize, _: (u32, u32)) -> Result<Vec<f16>, Box<dyn std::error::Error + Send + Sync>> {
            Ok(vec![f16::ONE; 7])
        }
    }
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let sources = sources(dir.path(), &[("a.tar", &good_tar(0, 3))]).await;
    let options = PrepareOptions { threads: 1, latents: Some(Arc::new(Wrong)), ..PrepareOptions::default() };
    let error = prepare(&sources, &store(&out), &small(), &options).await.unwrap_err();
    assert!(matches!(error, DataError::Latents(_)), "{error}");
}

#[tokio::test]
async fn a_destination_that_cannot_be_written_is_the_stores_error() {
    let dir = TempDir::new().unwrap();
    let sources = sources(dir.path(), &[("a.tar", &good_tar(0, 3))]).await;
    std::fs::write(dir.path().join("out"), b"a file in the way").unwrap();
    match Store::open(dir.path().join("out").to_str().unwrap()) {
        Err(error) => assert!(error.to_string().contains("out")),
        Ok(out) => assert!(matches!(prepare(&sources, &out, &small(), &threads(1)).await, Err(DataError::Store(_)))),
    }
}
