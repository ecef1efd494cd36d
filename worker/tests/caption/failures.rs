//! An endpoint that fails: what is tried again, what ends at once, and that no key is ever shown.

use crate::endpoint::{Answer, CUP, Endpoint, PICTURE, endpoints, refused, status};
use ella_worker::caption::{CaptionClient, CaptionConfig, CaptionRefusal, EndpointError, Passing};
use std::collections::BTreeMap;
use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::time::Instant;

const KEY: &str = "sk-hunter2-0123456789";

fn counted(kinds: &[(&str, u64)]) -> BTreeMap<String, u64> {
    kinds.iter().map(|(kind, count)| ((*kind).to_owned(), *count)).collect()
}

#[tokio::test(start_paused = true)]
async fn what_fails_in_passing_is_tried_again_and_counted() {
    let script = [
        status(500, "CUDA out of memory"),
        status(503, "loading"),
        Answer::Breaks,
        Answer::Raw("{\"choices\": [{\"mess"),
        Answer::Raw("{\"choices\": []}"),
        Answer::Stalls,
    ];
    let endpoint = Endpoint::new(script).await;
    let client = endpoint.client(&["timeout=5s"]);
    assert_eq!(client.caption(PICTURE, "").await.unwrap().caption, CUP);
    let counts = client.counts();
    assert_eq!(counts.passing, counted(&[("broke_off", 1), ("failing", 2), ("nonsense", 2), ("silent", 1)]));
    assert_eq!((counts.requests, counts.captioned, counts.failed), (7, 1, 0));
}

#[tokio::test(start_paused = true)]
async fn waits_that_an_endpoint_asks_for_are_kept() {
    for (header, wait) in [(("retry-after", "20"), 20.0), (("retry-after-ms", "2500"), 2.5)] {
        let endpoint = Endpoint::new([Answer::Status(429, header, "{\"error\":{\"message\":\"slow down\"}}")]).await;
        let client = endpoint.client(&["concurrency=2"]);
        let (first, second) = tokio::join!(client.caption(PICTURE, ""), async {
            // Asked once the first has been told to wait.
            while client.counts().passing.is_empty() {
                tokio::task::yield_now().await;
            }
            client.caption(PICTURE, "").await
        });
        assert_eq!((first.unwrap().caption.as_str(), second.unwrap().caption.as_str()), (CUP, CUP));
        endpoint.asked(|asked| {
            let waited = |request: usize| asked[request].at.duration_since(asked[0].at).as_secs_f64();
            assert!((wait - 0.01..wait + 0.1).contains(&waited(1)), "the other waits too: {}", waited(1));
            assert!((wait + 0.4..wait + 1.2).contains(&waited(2)), "{}", waited(2));
        });
        assert_eq!(client.counts().passing, counted(&[("busy", 1)]));
    }
}

#[tokio::test(start_paused = true)]
async fn an_endpoint_that_never_recovers_is_given_up_with_advice() {
    let failing = status(502, "<html>Bad Gateway</html>");
    for (answer, set, advice) in [
        (Answer::Stalls, "timeout=5s", "has not answered in 5 s"),
        (Answer::Drips, "timeout=5s", "raise `timeout`"),
        (failing, "timeout=5s", "Bad Gateway"),
        (Answer::Breaks, "timeout=5s", "see its server's log"),
        (Answer::Raw("It works!"), "timeout=5s", "It works!"),
        (status(429, "slow down"), "timeout=5s", "lower `concurrency`"),
    ] {
        let endpoint = Endpoint::new(std::iter::repeat_n(answer, 3)).await;
        let client = endpoint.client(&[set, "retries=2"]);
        let error = endpoints(client.caption(PICTURE, "").await.unwrap_err());
        assert!(error.passes() && error.to_string().contains("after 3 attempts"), "{error}");
        assert!(error.to_string().starts_with(&endpoint.url) && error.to_string().contains(advice), "{error}");
        assert_eq!((endpoint.times(), client.counts().failed), (3, 1));
    }
}

#[tokio::test(start_paused = true)]
async fn a_wait_that_is_too_long_is_not_waited_for() {
    let endpoint = Endpoint::new([Answer::Status(429, ("retry-after", "86400"), "come back tomorrow")]).await;
    let begun = Instant::now();
    let error = endpoints(endpoint.client(&[]).caption(PICTURE, "").await.unwrap_err());
    assert!(error.to_string().contains("wait 86400 s"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn what_no_retry_can_mend_ends_at_once_and_says_what_to_do() {
    let quota = "{\"error\":{\"code\":\"insufficient_quota\",\"message\":\"You exceeded your quota\"}}";
    for (answer, expected) in [
        (status(401, "{\"error\":\"who are you\"}"), "who are you); no key was sent: set OPENAI_API_KEY"),
        (status(403, ""), "(status 403); no key was sent"),
        (status(404, "{\"error\":{\"message\":\"The model `m` does not exist.\"}}"), "/v1/models lists its models"),
        (status(429, quota), "quota is used up: You exceeded your quota"),
        (status(405, "Method Not Allowed"), "status 405: Method Not Allowed"),
        (Answer::Status(301, ("location", "https://elsewhere/v1/chat/completions"), ""), "status 301: see https://elsewhere/v1"),
    ] {
        let endpoint = Endpoint::new([answer]).await;
        let client = endpoint.client(&[]);
        let error = endpoints(client.caption(PICTURE, "").await.unwrap_err());
        assert!(!error.passes() && error.to_string().contains(expected), "{error}");
        assert_eq!((endpoint.times(), client.counts().failed, client.counts().passing.len()), (1, 1, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn an_address_where_nobody_is_fails_soon() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    drop(listener);
    let config = CaptionConfig { endpoint: url.clone(), model: "m".to_owned(), ..CaptionConfig::default() };
    let begun = Instant::now();
    let error = endpoints(CaptionClient::with_key(config, None).unwrap().caption(PICTURE, "").await.unwrap_err());
    assert!(matches!(&error, EndpointError::GaveUp { attempts: 3, last: Passing::Unreachable(_), .. }), "{error}");
    assert!(error.to_string().contains("refused") && error.to_string().contains("check `endpoint`"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_picture_that_the_endpoint_always_fails_on_is_refused_if_others_are_served() {
    let alternating = std::iter::repeat_n([status(500, "cannot identify image"), Answer::Says(CUP, "stop")], 3).flatten();
    let endpoint = Endpoint::new(alternating).await;
    let client = endpoint.client(&["concurrency=2", "retries=2"]);
    let others = async {
        for attempt in 1..4 {
            while client.counts().passing.values().sum::<u64>() < attempt {
                tokio::task::yield_now().await;
            }
            client.caption(PICTURE, "").await.unwrap();
        }
    };
    let (failure, ()) = tokio::join!(client.caption(PICTURE, ""), others);
    let refused = refused(failure.unwrap_err());
    assert_eq!(refused.why, CaptionRefusal::Unanswered);
    assert!(refused.detail.contains("cannot identify image, after 3 attempts") || refused.detail.contains("after 3 attempts"), "{refused}");
    assert_eq!((client.counts().captioned, client.counts().failed), (3, 0));
}

#[tokio::test(start_paused = true)]
async fn a_request_that_fits_no_picture_is_the_endpoints_error() {
    let not_multimodal = status(400, "{\"error\":{\"message\":\"m is not a multimodal model\"}}");
    let endpoint = Endpoint::new(std::iter::repeat_n(not_multimodal, 40)).await;
    let client = endpoint.client(&[]);
    for _ in 0..15 {
        assert_eq!(refused(client.caption(PICTURE, "").await.unwrap_err()).why, CaptionRefusal::BadRequest);
    }
    let error = endpoints(client.caption(PICTURE, "").await.unwrap_err());
    assert!(error.to_string().contains("16 pictures in a row") && error.to_string().contains("not a multimodal model"), "{error}");
    assert!(!error.passes());
}

/// Where a test's log goes.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, text: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(text)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test(start_paused = true)]
async fn the_key_is_sent_and_shown_nowhere() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_writer(move || writer.clone()).finish();
    let _logging = tracing::subscriber::set_default(subscriber);
    let mut shown = String::new();
    for code in [401, 403, 404, 400, 418, 429, 500] {
        let endpoint = Endpoint::new(std::iter::repeat_n(Answer::Repeats(code), 3)).await;
        let client = CaptionClient::with_key(endpoint.config(&["retries=1", "api_key_env=CAPTION_KEY"]), Some(KEY.to_owned())).unwrap();
        let failure = client.caption(PICTURE, "").await.unwrap_err();
        endpoint.asked(|asked| assert_eq!(asked[0].key.as_deref(), Some(format!("Bearer {KEY}").as_str())));
        assert!(code != 401 || failure.to_string().contains("the key is not accepted: check CAPTION_KEY"), "{failure}");
        shown += &format!("{failure} {failure:?} {client:?} {:?} {:?}\n", client.counts(), client.config());
    }
    let endpoint = Endpoint::new([]).await;
    let bad = CaptionClient::with_key(endpoint.config(&["api_key_env=CAPTION_KEY"]), Some(format!("{KEY}\n"))).unwrap_err();
    assert!(bad.to_string().contains("CAPTION_KEY") && bad.to_string().contains("characters"), "{bad}");
    shown += &format!("{bad} {bad:?}");
    let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    assert!(log.contains("trying again") && log.contains("hyper"), "{log}");
    // A part of it would do, too: long texts are cut.
    assert!(!shown.contains("hunter2") && !log.contains("hunter2"), "{shown}\n{log}");
}

#[test]
fn a_variable_that_the_config_names_must_be_set() {
    let config = CaptionConfig { api_key_env: Some("ELLA_TEST_NO_SUCH_KEY".to_owned()), ..CaptionConfig::default() };
    let error = CaptionClient::new(config).unwrap_err().to_string();
    assert!(error.contains("ELLA_TEST_NO_SUCH_KEY (api_key_env) is not set"), "{error}");
}
