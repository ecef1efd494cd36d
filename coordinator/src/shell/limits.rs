//! How much of anything one peer, or all of them, may take of a coordinator. A coordinator serves 10,000 workers, each with one connection of
//! its own and one stream on it; whoever has shown no right to be there gets little, for a short time.

use std::time::Duration;

/// The largest message that is taken. Control messages are far smaller.
pub(super) const LARGEST_MESSAGE: usize = 1 << 20;
/// Streams of one connection that are open at once. A worker has one, and asks for the status beside it.
pub(super) const STREAMS: usize = 32;
/// The same, as HTTP/2 enforces it by itself, without a word or a count: above the limit that is counted.
pub(super) const STREAMS_AT_MOST: u32 = 128;
/// Bytes of all headers of one request. A token has 4096 at most, and little comes beside it.
pub(super) const HEADERS: usize = 16 << 10;
/// The same, as HTTP/2 enforces it by itself, and HTTP/1.1's buffer.
pub(super) const HEADERS_AT_MOST: u32 = 64 << 10;
/// Connections that are open at once, of both ports.
pub(super) const CONNECTIONS: usize = 32 << 10;
/// Of these, such that have shown nothing yet that lets them in.
pub(super) const STRANGERS: usize = 2048;
/// Of these, of one address: many workers may share one behind a gateway, and come back at once.
pub(super) const STRANGERS_OF_ONE: usize = 512;
/// How long a connection may be open before it has shown what lets it in; the TLS handshake is within that.
pub(super) const STRANGE: Duration = Duration::from_secs(10);
/// Failed tries of one address in a row that are answered as ever. More are answered only as [`FORGIVEN`] allows; who shows what is right
/// is let in whatever others at its address do.
pub(super) const FAILURES: f64 = 30.0;
/// Failed tries of one address that are forgiven in a second.
pub(super) const FORGIVEN: f64 = 0.5;
/// Addresses whose failed tries are counted one by one; all others are counted as one.
pub(super) const ADDRESSES: usize = 4096;
/// When the kernel begins to ask whether an idle peer still lives.
pub(super) const TCP_KEEPALIVE: Duration = Duration::from_secs(30);
/// How long the headers of an HTTP request may take, and how long a connection may be idle between two.
pub(super) const HTTP_HEADERS: Duration = Duration::from_secs(30);
/// How long HTTP answers under way may take once the coordinator leaves.
pub(super) const HTTP_LEAVING: Duration = Duration::from_secs(2);
/// Service accounts' tokens that are known for a while: one for each worker, and some.
pub(super) const REVIEWS: usize = 16 << 10;
/// How long a token that was found good is taken without asking again, and one that was not is refused.
pub(super) const REVIEWED: Duration = Duration::from_secs(60);
/// See [`REVIEWED`].
pub(super) const REJECTED: Duration = Duration::from_secs(10);
/// Questions that the cluster's API is asked at once; others wait, as long as a question may take.
pub(super) const REVIEWING: usize = 32;
