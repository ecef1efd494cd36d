//! What is asked, and what becomes of the answers.

use crate::endpoint::{Answer, CUP, Endpoint, PICTURE, refused, status};
use base64::Engine;
use ella_worker::caption::{CaptionRefusal, Estimate, Usage, Work};
use serde_json::json;
use std::time::Duration;

#[tokio::test(start_paused = true)]
async fn a_picture_is_asked_about_in_one_chat() {
    let endpoint = Endpoint::new([]).await;
    let client = endpoint.client(&[
        "prompt=\"Once called {caption}; {say} more\"",
        "system=Be brief",
        "seed=7",
        "image_detail=low",
        "extra.top_p=0.5",
        "max_tokens=99",
    ]);
    let captioned = client.caption(PICTURE, "a {cup}").await.unwrap();
    assert_eq!((captioned.caption.as_str(), captioned.trimmed), (CUP, false));
    assert_eq!(captioned.usage, Usage { input_tokens: 400, output_tokens: 60 });
    let url = format!("data:image/jpeg;base64,{}", base64::engine::general_purpose::STANDARD.encode(PICTURE));
    let expected = json!({
        "model": "m", "temperature": 0.0, "seed": 7, "max_tokens": 99, "top_p": 0.5,
        "messages": [
            { "role": "system", "content": "Be brief" },
            { "role": "user", "content": [
                { "type": "image_url", "image_url": { "url": url, "detail": "low" } },
                { "type": "text", "text": "Once called a {cup}; {say} more" },
            ] },
        ],
    });
    endpoint.asked(|asked| {
        assert_eq!((asked[0].path.as_str(), &asked[0].key, &asked[0].body), ("/v1/chat/completions", &None, &expected));
    });
}

#[tokio::test(start_paused = true)]
async fn pictures_are_told_by_their_bytes_and_others_are_not_asked_about() {
    let endpoint = Endpoint::new([]).await;
    let client = endpoint.client(&["extra.max_completion_tokens=50"]);
    for (bytes, kind) in [(&b"RIFF\x00\x01\x02\x03WEBPVP8 "[..], "webp"), (b"\x89PNG\r\n\x1a\n...", "png")] {
        client.caption(bytes, "").await.unwrap();
        endpoint.asked(|asked| {
            let body = &asked.last().unwrap().body;
            let url = body["messages"][0]["content"][0]["image_url"]["url"].as_str().unwrap();
            assert!(url.starts_with(&format!("data:image/{kind};base64,")), "{url}");
            assert_eq!((&body["max_completion_tokens"], body.get("max_tokens")), (&json!(50), None));
        });
    }
    for bytes in [&b""[..], b"GIF89a", b"RIFF\x00\x01\x02\x03WAVE", b"\xff\xd8"] {
        assert_eq!(refused(client.caption(bytes, "").await.unwrap_err()).why, CaptionRefusal::NotPicture);
    }
    assert_eq!(endpoint.times(), 2);
    assert_eq!(client.counts().refused, [(CaptionRefusal::NotPicture, 4)].into());
}

#[tokio::test(start_paused = true)]
async fn what_is_no_caption_is_counted_with_its_reason_and_its_tokens() {
    use CaptionRefusal::*;
    let script = [
        (Answer::Says("I’m sorry, I can’t help with that.", "stop"), Refused, "sorry"),
        (Answer::Says("", "stop"), Empty, "stop"),
        (Answer::Says("A cup.", "stop"), TooShort, "A cup."),
        (Answer::Says("One two three four five six seven eight nine ten eleven.", "stop"), TooLong, "eleven"),
        (Answer::Says("A red cup that goes on and", "length"), Cut, "goes on and"),
        (Answer::Says("A red", "content_filter"), ContentFilter, "A red"),
        (status(400, "{\"error\":{\"message\":\"image too small\"}}"), BadRequest, "status 400: image too small"),
        (status(422, "{\"detail\":\"no\"}"), BadRequest, "status 422: no"),
        (status(413, "<html>Too Large</html>"), BadRequest, "Too Large"),
        (status(400, "{\"error\":{\"code\":\"content_filter\",\"message\":\"filtered\"}}"), ContentFilter, "filtered"),
    ];
    let endpoint = Endpoint::new(script.iter().map(|(answer, _, _)| answer.clone())).await;
    let client = endpoint.client(&["max_words=10", "cut=refuse"]);
    for (_, why, said) in &script {
        let refused = refused(client.caption(PICTURE, "").await.unwrap_err());
        assert_eq!(refused.why, *why, "{refused}");
        assert!(refused.detail.contains(said), "{refused}");
        assert_eq!(refused.usage.output_tokens, if refused.detail.contains("status") || refused.detail == "filtered" { 0 } else { 60 });
    }
    client.caption(PICTURE, "").await.unwrap();
    let counts = client.counts();
    assert_eq!((counts.captioned, counts.failed, counts.requests), (1, 0, 11));
    assert_eq!((counts.input_tokens, counts.output_tokens), (7 * 400, 7 * 60));
    let expected = [(BadRequest, 3), (ContentFilter, 2), (Cut, 1), (Empty, 1), (Refused, 1), (TooLong, 1), (TooShort, 1)];
    assert_eq!(counts.refused, expected.into());
}

#[tokio::test(start_paused = true)]
async fn a_caption_that_was_cut_off_keeps_its_whole_sentences_if_so_wished() {
    let endpoint = Endpoint::new([Answer::Says("A red cup stands on a table. Behind it", "length")]).await;
    let captioned = endpoint.client(&["cut=trim"]).caption(PICTURE, "").await.unwrap();
    assert_eq!((captioned.caption.as_str(), captioned.trimmed), ("A red cup stands on a table.", true));
}

#[tokio::test(start_paused = true)]
async fn who_rambles_is_cut_off() {
    let endpoint = Endpoint::new([Answer::Rambles]).await;
    let client = endpoint.client(&[]);
    let refused = refused(client.caption(PICTURE, "").await.unwrap_err());
    assert_eq!(refused.why, CaptionRefusal::Rambled, "{refused}");
    assert!(refused.detail.contains("larger than") && refused.detail.chars().count() < 500, "{refused}");
    assert_eq!(endpoint.times(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_probe_tells_tokens_and_time() {
    let endpoint = Endpoint::new([Answer::After(3)]).await;
    let client = endpoint.client(&["concurrency=2"]);
    let probe = client.probe(PICTURE, "").await.unwrap();
    assert_eq!(probe.usage(), Usage { input_tokens: 400, output_tokens: 60 });
    assert_eq!(probe.elapsed.as_secs(), 3);
    let estimate = Estimate::new(client.config(), Work { pictures: 100, existing_words: 0, workers: 1 }, Some(&probe));
    assert!(estimate.measured);
    assert_eq!((estimate.input_tokens, estimate.output_tokens), (40_000, 6_000));
    let seconds = Duration::from_secs_f64(estimate.seconds.unwrap());
    assert!((150..160).contains(&seconds.as_secs()), "{seconds:?}");
}
