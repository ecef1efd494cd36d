//! How much is asked at once, and how fast, by the endpoint's own record.

use crate::endpoint::{Answer, CUP, Endpoint, PICTURE};
use futures::future::join_all;
use std::time::Duration;

/// Asks for so many captions, all at once.
async fn ask(endpoint: &Endpoint, set: &[&str], pictures: usize) {
    let client = endpoint.client(set);
    for captioned in join_all((0..pictures).map(|_| client.caption(PICTURE, ""))).await {
        assert_eq!(captioned.unwrap().caption, CUP);
    }
    assert_eq!((client.counts().captioned, endpoint.times()), (pictures as u64, pictures));
}

/// Times of the requests after the first, in milliseconds.
fn times(endpoint: &Endpoint) -> Vec<u128> {
    endpoint.asked(|asked| asked.iter().map(|request| request.at.duration_since(asked[0].at).as_millis()).collect())
}

#[tokio::test(start_paused = true)]
async fn no_more_are_asked_at_once_than_may() {
    let endpoint = Endpoint::new(std::iter::repeat_n(Answer::After(1), 20)).await;
    ask(&endpoint, &["concurrency=3"], 20).await;
    assert_eq!(endpoint.most(), 3);
}

#[tokio::test(start_paused = true)]
async fn requests_keep_their_limit() {
    let endpoint = Endpoint::new([]).await;
    // Two a second: two at once, and then one every half second.
    ask(&endpoint, &["requests_per_minute=120", "concurrency=64"], 12).await;
    let times = times(&endpoint);
    for (request, at) in times.iter().enumerate() {
        let due = request.saturating_sub(1) as u128 * 500;
        assert!((due.saturating_sub(5)..due + 100).contains(at), "{times:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn tokens_keep_their_limit_as_they_are_used_and_not_as_they_were_feared() {
    // Each is thought to take 10,000 and more, and takes 460: at 460 a second, one goes every second once that is known.
    let endpoint = Endpoint::new([]).await;
    let client = endpoint.client(&["tokens_per_minute=27600", "max_tokens=10000", "concurrency=1"]);
    for _ in 0..6 {
        client.caption(PICTURE, "").await.unwrap();
    }
    let times = times(&endpoint);
    for (request, at) in times.iter().enumerate() {
        let due = Duration::from_secs(request as u64).as_millis();
        assert!((due.saturating_sub(20)..due + 100).contains(at), "{times:?}");
    }
}
