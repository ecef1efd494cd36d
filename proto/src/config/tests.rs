//! What is read, refused, and bound.

use super::*;

const SMALL: &str = r#"
    [run]
    output = "runs/a"
    [base]
    model = "m"
    [text]
    model = "t"
    [data]
    path = "d"
"#;

fn parse(extra: &str, set: &[&str]) -> Result<RunConfig, ConfigError> {
    let set: Vec<String> = set.iter().map(|s| (*s).to_owned()).collect();
    RunConfig::parse(&format!("{SMALL}\n{extra}"), "run.toml", &set)
}

#[test]
fn the_effective_config_reads_back_as_itself() {
    let config = parse("[train]\nsnr_gamma = 5.0", &["workers.count=4", "workers.lease=\"250ms\""]).unwrap();
    assert_eq!(RunConfig::parse(&config.to_toml(), "x", &[]).unwrap(), config);
    assert_eq!(config.workers.count, 4);
    assert_eq!(config.workers.lease, Millis(250));
    assert_eq!(config.train.lanes(), 4);
    let config = parse("", &["base.loras=[{file=\"a.safetensors\"},{file=\"b.safetensors\",weight=0.8}]"]).unwrap();
    assert_eq!(config.base.loras.iter().map(|lora| lora.weight).collect::<Vec<_>>(), [1.0, 0.8]);
    assert_eq!(RunConfig::parse(&config.to_toml(), "x", &[]).unwrap(), config);
}

#[test]
fn a_url_with_a_secret_is_refused_without_telling_it() {
    for key in ["run.output", "base.model", "text.model", "connector.from", "data.path"] {
        for url in [
            "s3://user:hunter2@bucket/a",
            "https://hunter2@host",
            "s3://bucket/a?sig=hunter2",
            "az://c/a#hunter2",
            "s3://user:hunter2/more@bucket/a",
            "https://user:hunter2?more@host/a",
        ] {
            let said = parse("", &[&format!("{key}={url}")]).unwrap_err().to_string();
            assert!(said.contains(key) && said.contains("environment") && !said.contains("hunter2"), "{said}");
        }
    }
    for place in ["s3://bucket/a", "runs/what?#1", "org/name@main", "http://host:80/a@b", "http://[::1]/a@b"] {
        assert_eq!(parse("", &[&format!("data.path={place}")]).unwrap().data.path, place);
    }
}

#[test]
fn unknown_keys_are_refused_with_the_nearest() {
    let text = |e: ConfigError| e.to_string();
    assert_eq!(text(parse("[train]\nstep = 3", &[]).unwrap_err()), "run.toml: unknown key `train.step`; did you mean `train.steps`?");
    assert_eq!(
        text(parse("[train.optimiser]\nlr = 1.0", &[]).unwrap_err()),
        "run.toml: unknown key `train.optimiser`; did you mean `train.optimizer`?"
    );
    assert_eq!(text(parse("", &["worker.count=3"]).unwrap_err()), "--set worker.count=3: unknown key `worker`; did you mean `workers`?");
    assert_eq!(text(parse("", &["data.cahce_bytes=1"]).unwrap_err()).rsplit('`').nth(1), Some("data.cache_bytes"));
    assert_eq!(text(parse("", &["lr=1"]).unwrap_err()).rsplit('`').nth(1), Some("train.optimizer.lr"));
    let steps = text(parse("", &["steps=5"]).unwrap_err());
    assert_eq!(steps, "--set steps=5: unknown key `steps`; did you mean `sample.steps` or `train.steps`?");
    assert_eq!(text(parse("[zzzzzzzzz]", &[]).unwrap_err()), "run.toml: unknown key `zzzzzzzzz`");
    assert_eq!(text(parse("[trian]", &[]).unwrap_err()), "run.toml: unknown key `trian`; did you mean `train`?");
}

#[test]
fn values_out_of_range_name_key_rule_and_value() {
    for (toml, key) in [
        ("[train]\nsteps = 0", "train.steps"),
        ("[train]\nglobal_batch = 30", "train.global_batch"),
        ("[train]\ncompression = \"bf16\"", "train.compression"),
        ("[connector]\ndtype = \"fp16\"", "bf16"),
        ("[train]\ncaption_dropout = 1.5", "train.caption_dropout"),
        ("[train]\ncaption_dropout = nan", "train.caption_dropout"),
        ("[train.optimizer]\nlr = -1.0", "train.optimizer.lr"),
        ("[train.optimizer]\nbetas = [0.9, 1.0]", "train.optimizer.betas"),
        ("[train.optimizer]\neps = 0.0", "train.optimizer.eps"),
        ("[workers]\ncount = 9", "workers.count"),
        ("[connector]\nlatents = 9223372036854775807", "connector.latents"),
        ("[connector]\nlayers = 9223372036854775807", "connector.layers"),
        ("[connector]\nheads = 9223372036854775807", "connector.heads"),
        ("[connector]\nwidth = 9223372036854775807", "connector.width"),
        ("[connector]\nwidth = 0", "connector.width"),
        ("window = 4294967297", "data.window"),
        ("[train]\nglobal_batch = 4294967296", "train.global_batch"),
        ("[train]\nglobal_batch = 4294967296\nmicro_batch = 4294967296", "train.global_batch"),
        ("[train]\nmicro_batch = 4294967296", "train.micro_batch"),
        ("[train]\nsteps = 9223372036854775807", "train.steps"),
        ("[workers]\nmin = 0", "workers.min"),
        ("[workers]\ncount = 2\nmin = 3", "workers.min"),
        ("[workers]\ncount = 2\nmax = 1", "workers.max"),
        ("[workers]\nthreads = 100000", "workers.threads"),
        ("[workers]\ngpu_memory = \"1MiB\"", "workers.gpu_memory"),
        ("[workers]\nsplit_on_oom = true", "workers.split_on_oom"),
        ("[sample]\nevery = 5", "sample.prompts"),
        ("[sample]\nprompts_file = \"/no/such/file\"", "sample.prompts_file"),
        ("[sample]\nprompts = [\"a\"]\nprompts_file = \"p\"", "sample.prompts_file"),
        ("[sample]\nimages = 0", "sample.images"),
        ("[sample]\nsteps = 0", "sample.steps"),
        ("[sample]\nguidance = nan", "sample.guidance"),
        ("[sample]\nsize = \"0x64\"", "sample.size"),
        ("[sample]\nsize = \"64x20000\"", "sample.size"),
        ("[sample]\nsampler = \"dpm\"", "dpm++2m"),
        ("[sample]\nprompts = [\"a\", \"b\"]\nimages = 501", "sample.images"),
        ("[checkpoint]\nkeep = 0", "checkpoint.keep"),
        ("[checkpoint]\nmax_lost_work = \"0s\"", "checkpoint.max_lost_work"),
        ("[checkpoint]\nevery = 0", "checkpoint.every"),
        ("[connector]\nkind = \"ada\"", "tsc-zero"),
        ("[[base.loras]]\nfile = \"x\"\nweight = inf", "base.loras"),
        ("[[base.loras]]\nfile = \"x\"\nwieght = 1.0", "wieght"),
    ] {
        let error = parse(toml, &[]).unwrap_err().to_string();
        assert!(error.contains(&format!("`{key}`")), "{toml}: {error}");
    }
    let rounded =
        |set: &[&str]| parse("", &[&["text.features=ahead", "workers.tf32=true"], set].concat()).map_err(|error| error.to_string());
    assert!(rounded(&[]).unwrap_err().contains("`workers.tf32`"));
    assert!(rounded(&["text.dtype=bf16"]).is_ok() && rounded(&["text.features=inline"]).is_ok());
    let error = parse("[train]\nsteps = \"many\"", &[]).unwrap_err().to_string();
    assert_eq!(error, "run.toml: line 12, column 9: invalid type: string \"many\", expected u64");
    let error = parse("[train\nsteps = 3", &[]).unwrap_err().to_string();
    assert!(error.starts_with("run.toml: line 11, column 7: ") && !error.contains('\n'), "{error}");
    let error = parse("", &["train.steps=many"]).unwrap_err().to_string();
    assert_eq!(error, "run.toml with --set: invalid type: string \"many\", expected u64 in `train.steps`");
    let error = parse("", &["text.max_tokens=100000"]).unwrap_err().to_string();
    assert_eq!(error, "run.toml with --set: `text.max_tokens` is 100000, but it must lie from 1 to 65536");
    let error = parse("", &["train.steps=0"]).unwrap_err().to_string();
    assert_eq!(error, "run.toml with --set: `train.steps` is 0, but it must lie from 1 to 1099511627776");
    let error = parse("", &["train.steps=99999999999999999999"]).unwrap_err().to_string();
    assert!(error.starts_with("--set train.steps=99999999999999999999: the number is out of range"), "{error}");
    let error = parse("", &["run.output="]).unwrap_err().to_string();
    assert_eq!(error, "run.toml with --set: `run.output` is \"\", but it must be a path or a URL");
    let error = parse("", &["workers.lease=0s"]).unwrap_err().to_string();
    assert_eq!(error, "run.toml with --set: `workers.lease` is \"0ms\", but it must be 1ms or more");
    let error = parse("", &["workers.gpu_memory=lots"]).unwrap_err().to_string();
    assert!(error.contains("\"lots\" is not a size; write one such as"), "{error}");
    let error = parse("", &["train.steps"]).unwrap_err().to_string();
    assert!(error.contains("section.key=value"), "{error}");
}

#[test]
fn prompts_of_a_file_stand_in_the_effective_config() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompts.txt");
    std::fs::write(&file, "a red circle\n\n  two stars \n").unwrap();
    let set = [format!("sample.prompts_file={}", file.display()), "sample.every=5".to_owned(), "sample.size=64x32".to_owned()];
    let config = parse("", &set.each_ref().map(String::as_str)).unwrap();
    assert_eq!(
        (config.sample.prompts.clone(), &config.sample.prompts_file),
        (vec!["a red circle".to_owned(), "two stars".to_owned()], &None)
    );
    assert_eq!(RunConfig::parse(&config.to_toml(), "x", &[]).unwrap(), config);
    std::fs::write(&file, "\n").unwrap();
    let error = parse("", &[&set[0]]).unwrap_err().to_string();
    assert!(error.contains("`sample.prompts_file`") && error.contains("has none"), "{error}");
    let error = parse("[sample]\nsize = \"wide\"", &[]).unwrap_err().to_string();
    assert!(error.contains("line 12") && error.contains("\"wide\" is not a size; expected WIDTHxHEIGHT"), "{error}");
    let error = parse("[sample]\nprompt = [\"a\"]", &[]).unwrap_err().to_string();
    assert_eq!(error, "run.toml: unknown key `sample.prompt`; did you mean `sample.prompts`?");
}

#[test]
fn captions_are_chosen_by_column_and_weight() {
    let config = parse("", &["data.captions=[{column=\"dense\",weight=0.7},{column=\"short\"}]"]).unwrap();
    assert_eq!(config.data.captions.iter().map(|c| (c.column.as_str(), c.weight)).collect::<Vec<_>>(), [("dense", 0.7), ("short", 1.0)]);
    assert_ne!(config.digest(), parse("", &[]).unwrap().digest(), "what is trained on depends on it");
    for bad in ["[{column=\"a\",weight=-1.0}]", "[{column=\"a\",weight=0.0}]", "[{column=\"a\"},{column=\"a\"}]", "[{column=\"\"}]"] {
        let error = parse("", &[&format!("data.captions={bad}")]).unwrap_err().to_string();
        assert!(error.contains("`data.captions`"), "{error}");
    }
}

#[test]
fn every_kind_of_connector_is_read_and_an_mlp_wants_rows_of_one_length() {
    for (name, kind) in [
        ("tsc", ConnectorKind::Tsc),
        ("tsc-zero", ConnectorKind::TscZero),
        ("resampler", ConnectorKind::Resampler),
        ("mlp", ConnectorKind::Mlp),
    ] {
        assert_eq!(parse(&format!("[connector]\nkind = \"{name}\""), &[]).unwrap().connector.kind, kind);
        let ragged = parse("", &[&format!("connector.kind={name}"), "text.padding=none"]).map_err(|error| error.to_string());
        match kind {
            ConnectorKind::Mlp => assert!(ragged.unwrap_err().contains("`text.padding` is \"none\"")),
            _ => assert_eq!(ragged.unwrap().connector.kind, kind),
        }
    }
}

#[test]
fn the_digest_binds_what_determines_the_bits_and_nothing_else() {
    let base = parse("", &[]).unwrap();
    for free in ["data.cache=/tmp/x", "data.cache_bytes=0", "data.memory_bytes=9"] {
        assert_eq!(parse("", &[free]).unwrap().digest(), base.digest(), "{free}");
    }
    for free in [
        "workers.count=2",
        "run.output=x",
        "checkpoint.every=7",
        "checkpoint.keep=1",
        "train.steps=5",
        "workers.lease=1s",
        "workers.max=2",
        "workers.straggler=evict",
        "workers.join_window=0s",
        "workers.gpu_memory=40GiB",
        "workers.device=cpu",
    ] {
        assert_eq!(parse("", &[free]).unwrap().digest(), base.digest(), "{free}");
        assert_eq!(base.on_resume(free.split('=').next().unwrap()), OnResume::Free, "{free}");
    }
    let sampled = parse("[sample]\nevery = 5\nprompts = [\"a\"]", &[]).unwrap();
    assert_eq!(sampled.digest(), base.digest(), "what is drawn changes no trained bit");
    let ahead = parse("", &["text.features=ahead"]).unwrap();
    assert_eq!(ahead.digest(), base.digest(), "a run that began so may go on with the features that it made");
    for bound in [
        "workers.threads=2",
        "workers.tf32=true",
        "text.features=inline",
        "run.seed=1",
        "train.micro_batch=4",
        "text.padding=none",
        "text.layers=average",
        "train.optimizer.lr=1",
        "data.window=2",
        "connector.kind=mlp",
    ] {
        let other = parse("", &[bound]).unwrap();
        assert_ne!(other.digest(), base.digest(), "{bound}");
        let key = bound.split('=').next().unwrap();
        assert_eq!(base.binding_differences(&other), vec![key.to_owned()]);
        assert_eq!(base.on_resume(key), OnResume::Same, "{key}");
    }
    let fast = parse("", &["train.reduction=fast"]).unwrap();
    assert_eq!(parse("", &["train.reduction=fast", "workers.split_on_oom=true"]).unwrap().digest(), fast.digest());
    let cosine = parse("", &["train.schedule.kind=cosine"]).unwrap();
    assert_ne!(parse("", &["train.schedule.kind=cosine", "train.steps=9"]).unwrap().digest(), cosine.digest());
    assert_eq!(cosine.on_resume("train.steps"), OnResume::Same);
    assert!(base.further().contains("raise train.steps") && cosine.further().contains("connector.from"));
    assert_eq!(base.on_resume("text.model"), OnResume::SameContent);
}
