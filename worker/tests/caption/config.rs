//! The config: strict, checked, and bound to what it makes.

use ella_worker::caption::{CaptionConfig, Cut, DEFAULT_PROMPT, ImageDetail};

const SMALL: &str = "endpoint = \"http://host:8000/v1\"\nmodel = \"qwen\"\n";

fn parse(extra: &str, set: &[&str]) -> Result<CaptionConfig, String> {
    let set: Vec<String> = set.iter().map(|s| (*s).to_owned()).collect();
    CaptionConfig::parse(&format!("{SMALL}{extra}"), "caption.toml", &set).map_err(|error| error.to_string())
}

#[test]
fn a_table_is_read_with_defaults_and_overrides() {
    let config = parse("", &[]).unwrap();
    assert_eq!((config.prompt.as_str(), config.key_env(), config.image_tokens), (DEFAULT_PROMPT, "OPENAI_API_KEY", 324));
    let set = ["cut=trim", "image_detail=high", "timeout=3s", "extra.chat_template_kwargs.enable_thinking=false", "refusals=[\"no\"]"];
    let config = parse("temperature = 0.5\n[extra]\ntop_p = 0.9", &set).unwrap();
    assert_eq!((config.cut, config.image_detail, config.timeout.0), (Cut::Trim, Some(ImageDetail::High), 3000));
    assert_eq!(config.extra["chat_template_kwargs"]["enable_thinking"], false);
    assert_eq!((config.extra["top_p"].as_f64(), config.refusals.len()), (Some(0.9), 1));
}

#[test]
fn what_is_wrong_is_named_with_its_rule() {
    assert_eq!(parse("max_token = 3", &[]).unwrap_err(), "caption.toml: unknown key `max_token`; did you mean `max_tokens`?");
    for (set, expected) in [
        ("endpoint=host:8000", "`endpoint` is no such URL"),
        ("endpoint=ftp://host/v1", "`endpoint`"),
        ("endpoint=https://user:secret@host/v1", "without user, password"),
        ("endpoint=https://host/v1?key=secret", "`endpoint`"),
        ("model=\" \"", "`model` is empty"),
        ("prompt=\"\"", "`prompt` is empty"),
        ("max_tokens=0", "`max_tokens` is 0, but it must lie from 1"),
        ("temperature=-1.0", "`temperature` is -1"),
        ("temperature=nan", "`temperature`"),
        ("concurrency=0", "`concurrency`"),
        ("concurrency=100000", "`concurrency`"),
        ("requests_per_minute=0", "`requests_per_minute`"),
        ("tokens_per_minute=0", "`tokens_per_minute`"),
        ("timeout=0s", "`timeout`"),
        ("timeout=9 parsecs", "not a duration"),
        ("retries=21", "`retries` is 21, but it must be 20 at most"),
        ("min_words=251", "`min_words`"),
        ("image_tokens=0", "`image_tokens`"),
        ("input_price=-1.0", "`input_price`"),
        ("output_price=inf", "`output_price`"),
        ("refusals=[\"\"]", "`refusals`"),
        ("api_key_env=\"\"", "`api_key_env`"),
        ("extra.model=x", "`extra` is with `model`"),
        ("cut=off", "off"),
        ("seed=-1", "seed"),
    ] {
        let error = parse("", &[set]).unwrap_err();
        assert!(error.starts_with("caption.toml with --set: ") && error.contains(expected), "{set}: {error}");
        assert!(!error.contains("secret"), "{error}");
    }
    assert!(CaptionConfig::parse("model = \"m\"", "x", &[]).unwrap_err().to_string().contains("`endpoint`"));
}

#[test]
fn what_binds_a_column_is_what_determines_captions_and_nothing_else() {
    let base = parse("", &[]).unwrap().binding();
    for free in [
        "endpoint=http://other/v1",
        "concurrency=2",
        "requests_per_minute=2",
        "tokens_per_minute=2",
        "timeout=1s",
        "retries=1",
        "api_key_env=X",
        "image_tokens=9",
        "input_price=1.0",
        "output_price=1.0",
    ] {
        assert_eq!(parse("", &[free]).unwrap().binding(), base, "{free}");
    }
    for bound in [
        "model=x",
        "prompt=x",
        "system=x",
        "max_tokens=9",
        "temperature=1.0",
        "seed=1",
        "image_detail=low",
        "refusals=[\"x\"]",
        "min_words=6",
        "max_words=9",
        "cut=trim",
        "extra.top_p=0.5",
    ] {
        assert_ne!(parse("", &[bound]).unwrap().binding(), base, "{bound}");
    }
}
