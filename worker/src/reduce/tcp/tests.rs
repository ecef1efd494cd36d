//! What the conformance suite cannot try: strangers, missing ranks, processes that die or stop, and bytes that are no frame.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use ella_proto::access::TlsFiles;

use super::hello::{HEADER, Hello, Key, Nonce, Refusal};
use super::link::Link;
use super::*;
use crate::reduce::conformance::{LONG, certificates, tcp_ring};

const SHORT: Duration = Duration::from_millis(200);
const SESSION: [u8; 16] = [1; 16];

fn listen() -> Listener {
    Listener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).expect("a port")
}

fn membership(rank: u32, peers: &[SocketAddr]) -> Membership {
    let world = peers.len() as u32;
    Membership { rank, world, next: peers[((rank + 1) % world) as usize], session: SESSION, generation: 5 }
}

/// A greeting of rank 1 to rank 0 of a world of two.
const GOOD: Hello = Hello { nonce: [3; 16], generation: 5, world: 2, from: 1, to: 0, verdict: None };

/// As one says it who knows the secret of this session.
fn spoken(hello: Hello, session: [u8; 16]) -> [u8; Hello::LEN] {
    hello.encode(&Key::new(&session), None)
}

/// Calls `address`, says `words`, and returns the answer, if one comes before the connection is closed.
fn call(address: SocketAddr, words: &[u8]) -> (TcpStream, Option<Hello>) {
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream.set_read_timeout(Some(LONG)).expect("a socket option");
    stream.write_all(words).expect("room in the buffer");
    let mut answer = [0; Hello::LEN];
    let answer = stream.read_exact(&mut answer).ok().and_then(|()| Hello::decode(&answer).ok());
    (stream, answer)
}

#[test]
fn strangers_are_refused_with_a_reason_and_counted_and_the_ring_closes_all_the_same() {
    let [zero, one] = [listen(), listen()];
    let peers = [zero.address(), one.address()];
    let ring = thread::scope(|scope| {
        let first = scope.spawn(|| Tcp::connect(zero, &membership(0, &peers), LONG));
        let bad = [
            (GOOD, [2; 16], Refusal::Session),
            (Hello { generation: 4, ..GOOD }, SESSION, Refusal::Generation),
            (Hello { generation: 6, ..GOOD }, SESSION, Refusal::Generation),
            (Hello { from: 0, ..GOOD }, SESSION, Refusal::Rank),
        ];
        for (hello, session, refusal) in bad {
            let (_, answer) = call(peers[0], &spoken(hello, session));
            assert_eq!(answer.and_then(|answer| answer.verdict), Some(refusal));
        }
        let mut other_version = spoken(GOOD, SESSION);
        other_version[8] = 9;
        assert_eq!(call(peers[0], &other_version).1.and_then(|answer| answer.verdict), Some(Refusal::Version));
        assert_eq!(call(peers[0], &[b'G'; Hello::LEN]).1, None);
        // One that hangs up half-way, and one that says nothing: neither is waited for.
        drop(TcpStream::connect(peers[0]).and_then(|mut stream| stream.write_all(&spoken(GOOD, SESSION)[..9])));
        let silent = TcpStream::connect(peers[0]);
        let second = scope.spawn(|| Tcp::connect(one, &membership(1, &peers), LONG));
        let ring = [first, second].map(|rank| rank.join().expect("no panic").expect("the right ones meet"));
        drop(silent);
        ring
    });
    let expected = Refusals { garbage: 1, version: 1, session: 1, generation: 2, rank: 1, silent: 1, ..Refusals::default() };
    assert_eq!(*ring[0].refused(), expected);
    assert_eq!(*ring[1].refused(), Refusals::default());
}

#[test]
fn a_greeting_that_was_heard_before_lets_nobody_in_and_one_that_proves_nothing_is_not_believed() {
    let [zero, one] = [listen(), listen()];
    let peers = [zero.address(), one.address()];
    let error = thread::scope(|scope| {
        let first = scope.spawn(|| Tcp::connect(zero, &membership(0, &peers), 4 * SHORT));
        one.socket.set_nonblocking(false).expect("a socket option");
        let (mut from_zero, _) = one.socket.accept().expect("rank 0 calls");
        // Whoever listens at the next rank's address without the secret is not taken for it, whatever it repeats.
        from_zero.write_all(&spoken(GOOD, SESSION)).expect("room in the buffer");
        let [once, again] = [(); 2].map(|()| call(peers[0], &spoken(GOOD, SESSION)).1.expect("an answer").verdict);
        assert_eq!((once, again), (None, Some(Refusal::Session)));
        let other = Hello { nonce: Nonce::default(), ..GOOD };
        assert_eq!(call(peers[0], &spoken(other, SESSION)).1.expect("an answer").verdict, None, "another nonce is another greeting");
        first.join().expect("no panic").expect_err("nobody proved to be rank 1")
    });
    let CollectiveError::Meet { missing, refused, .. } = error else { panic!("expected Meet, found {error:?}") };
    assert!(missing.contains("rank 1 was not reached") && missing.contains("stranger") && refused.session == 1, "{missing} {refused}");
}

fn ours() -> Option<ClientTls> {
    certificates("ours", "ours")
}

/// Greets as rank 1 does, under TLS with these certificates; what comes of that.
fn call_under_tls(address: SocketAddr, tls: Option<ClientTls>) -> io::Error {
    let stream = TcpStream::connect(address).expect("it listens");
    stream.set_read_timeout(Some(LONG)).expect("a socket option");
    let mut link = Link::calls(stream, address.ip(), tls.and_then(|tls| tls.peers()).as_ref()).expect("a session");
    link.say(&spoken(GOOD, SESSION)).expect("room in the buffer");
    link.read(&mut [0; Hello::LEN]).expect_err("a refusal")
}

#[test]
fn who_does_not_come_through_the_handshake_is_counted_and_the_ring_closes_all_the_same() {
    let [zero, one] = [(); 2].map(|()| listen().secured(ours()));
    let peers = [zero.address(), one.address()];
    let ring = thread::scope(|scope| {
        let first = scope.spawn(|| Tcp::connect(zero, &membership(0, &peers), LONG));
        // In clear text the secret is of no use; and each side refuses what its own CA has not signed.
        assert_eq!(call(peers[0], &spoken(GOOD, SESSION)).1, None);
        let theirs = call_under_tls(peers[0], certificates("others", "ours")).to_string();
        let mine = call_under_tls(peers[0], certificates("ours", "others")).to_string();
        assert!(theirs.contains("UnknownCA") && mine.contains("UnknownIssuer"), "{theirs}; {mine}");
        // One that hangs up half-way, and one that says no more: neither is waited for.
        drop(TcpStream::connect(peers[0]).and_then(|mut stream| stream.write_all(&[22, 3, 1])));
        let silent = TcpStream::connect(peers[0]).and_then(|mut stream| stream.write_all(&[22, 3, 1, 2, 0, 1]).map(|()| stream));
        let second = scope.spawn(|| Tcp::connect(one, &membership(1, &peers), LONG));
        let ring = [first, second].map(|rank| rank.join().expect("no panic").expect("the right ones meet"));
        drop(silent);
        ring
    });
    assert_eq!(*ring[0].refused(), Refusals { silent: 1, one_sided: 1, handshake: 2, ..Refusals::default() });
    assert_eq!(*ring[1].refused(), Refusals::default());
}

/// What comes on one link is said on the other: so many bytes, if they come.
fn pass_on(from: &mut Link, to: &mut Link, bytes: usize) {
    let mut buffer = vec![0; bytes];
    if from.read(&mut buffer).is_ok_and(|n| n == bytes) {
        let _ = to.say(&buffer);
    }
}

/// With a certificate that both take, it has a session with each: the proofs of one prove nothing in the other.
#[test]
fn who_stands_between_two_ranks_with_a_certificate_of_the_ca_is_refused() {
    let [zero, one] = [(); 2].map(|()| listen().secured(ours()));
    let peers = [zero.address(), one.address()];
    let between = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let diverted = Membership { next: between.local_addr().expect("it is bound"), ..membership(0, &peers) };
    let errors = thread::scope(|scope| {
        let first = scope.spawn(|| Tcp::connect(zero, &diverted, 4 * SHORT));
        let second = scope.spawn(|| Tcp::connect(one, &membership(1, &peers), 4 * SHORT));
        let tls = ours().and_then(|tls| tls.peers());
        let (caller, called) = (between.accept().expect("rank 0 calls").0, TcpStream::connect(peers[1]).expect("it listens"));
        for stream in [&caller, &called] {
            stream.set_read_timeout(Some(LONG)).expect("a socket option");
        }
        let mut caller = Link::called(caller, tls.as_ref()).expect("a session");
        let mut called = Link::calls(called, peers[1].ip(), tls.as_ref()).expect("a session");
        pass_on(&mut caller, &mut called, Hello::LEN);
        pass_on(&mut called, &mut caller, Hello::LEN);
        // Were the two of them content, this would close the ring.
        pass_on(&mut caller, &mut called, HEADER + 8);
        [first, second].map(|rank| rank.join().expect("no panic").expect_err("somebody is between them"))
    });
    let told = errors.map(|error| match error {
        CollectiveError::Meet { missing, refused, .. } => (missing, *refused),
        other => panic!("expected Meet, found {other:?}"),
    });
    assert!(told[0].0.contains("it refused this rank as another run, or a stranger"), "{}", told[0].0);
    assert_eq!((told[1].0.as_str(), &told[1].1), ("rank 0 did not come", &Refusals { session: 1, ..Refusals::default() }));
}

#[test]
fn ranks_of_which_each_has_another_ca_are_told_what_to_do() {
    let [zero, one] = ["ours", "others"].map(|ca| listen().secured(certificates(ca, ca)));
    let peers = [zero.address(), one.address()];
    let errors = thread::scope(|scope| {
        let first = scope.spawn(|| Tcp::connect(zero, &membership(0, &peers), 4 * SHORT));
        let second = scope.spawn(|| Tcp::connect(one, &membership(1, &peers), 4 * SHORT));
        [first, second].map(|rank| rank.join().expect("no panic").expect_err("they differ"))
    });
    for error in errors {
        let CollectiveError::Meet { missing, refused, .. } = error else { panic!("expected Meet, found {error:?}") };
        assert!(missing.contains("UnknownIssuer") && missing.contains("--tls-ca of every worker"), "{missing}");
        assert!(refused.handshake > 0, "{refused}");
    }
}

/// The one that has them, at once; the other when it gives up.
#[test]
fn of_two_ranks_of_which_one_has_certificates_each_is_told_of_the_other() {
    // A CA alone, which is for the coordinator's certificate, changes nothing.
    let ca = concat!(env!("CARGO_MANIFEST_DIR"), "/src/reduce/tcp/certs/ours/ca.crt");
    let ca_alone = ClientTls::load(&TlsFiles { ca: Some(ca.into()), ..TlsFiles::default() }).expect("the file will do");
    for secured in [true, false] {
        let of = |has: bool| if has { ours() } else { Some(ca_alone.clone()) };
        let (zero, one, nobody) = (listen().secured(of(secured)), listen().secured(of(!secured)), listen());
        let (peers, began) = ([zero.address(), one.address()], Instant::now());
        let to_nobody = Membership { next: nobody.address(), ..membership(1, &peers) };
        let times = (if secured { LONG } else { 3 * SHORT }, LONG);
        let (calls, called) = thread::scope(|scope| {
            let called = scope.spawn(|| Tcp::connect(one, &to_nobody, 4 * SHORT).expect_err("nobody answers it"));
            let calls = Tcp::connect_unless(zero, &membership(0, &peers), times).expect_err("they differ");
            (calls, called.join().expect("no panic"))
        });
        assert!(began.elapsed() < LONG / 2);
        assert_eq!(matches!(calls, CollectiveError::OneSided { rank: 0, next: 1, address } if address == peers[1]), secured, "{calls:?}");
        assert!(calls.to_string().contains("give --tls-cert, --tls-key and --tls-ca to every worker"), "{calls}");
        let CollectiveError::Meet { refused, .. } = called else { panic!("expected Meet, found {called:?}") };
        assert!(refused.one_sided > 0 && *refused == Refusals { one_sided: refused.one_sided, ..Refusals::default() }, "{refused}");
    }
}

#[test]
fn an_abort_ends_a_handshake_at_once() {
    let (zero, one) = (listen().secured(ours()), listen());
    let peers = [zero.address(), one.address()];
    let (handle, began) = (zero.abort_handle(), Instant::now());
    let half = TcpStream::connect(peers[0]).and_then(|mut stream| stream.write_all(&[22, 3, 1, 2, 0, 1]).map(|()| stream));
    let result = thread::scope(|scope| {
        let meeting = scope.spawn(|| Tcp::connect(zero, &membership(0, &peers), LONG));
        one.socket.set_nonblocking(false).expect("a socket option");
        let (mut from_zero, _) = one.socket.accept().expect("rank 0 calls");
        let mut hello = [0; 2];
        from_zero.read_exact(&mut hello).expect("a hello");
        assert_eq!(hello, [22, 3], "of TLS");
        handle.abort().expect("aborted");
        meeting.join().expect("no panic")
    });
    drop(half);
    assert!(matches!(result, Err(CollectiveError::Aborted)), "{result:?}");
    assert!(began.elapsed() < LONG / 2);
}

/// As TLS does by itself after 2^24 records, which is a matter of minutes: the other side is asked to answer, and has nothing to send here.
#[test]
fn keys_are_changed_while_sums_go_on() {
    thread::scope(|scope| {
        for mut ring in tcp_ring(2, ours()) {
            scope.spawn(move || {
                for round in 0..40 {
                    match &mut ring.links {
                        Some(Links { next: Link::Tls(tls), .. }) => tls.session.refresh_traffic_keys().expect("the handshake is over"),
                        links => panic!("expected TLS, found {links:?}"),
                    }
                    let mut data = vec![round; 10_000];
                    ring.sum_i64(&mut data).expect("both are there");
                    assert!(data.iter().all(|sum| *sum == 2 * round), "round {round}");
                }
            });
        }
    });
}

/// One that is late has a listener that takes calls: it began with that.
#[test]
fn a_next_rank_that_is_not_there_is_told_sooner_than_one_that_is_late() {
    for there in [false, true] {
        let [zero, one] = [listen(), listen()];
        let peers = [zero.address(), one.address()];
        let _late = there.then_some(one);
        let (timeout, began) = (if there { 4 * SHORT } else { LONG }, Instant::now());
        let error = Tcp::connect_unless(zero, &membership(0, &peers), (timeout, SHORT)).expect_err("nobody answers");
        let CollectiveError::Meet { unreached, missing, .. } = error else { panic!("expected Meet, found {error:?}") };
        assert!(unreached != there && missing.contains("rank 1 was not reached"), "{missing}");
        let took = began.elapsed();
        assert!(if there { took >= timeout } else { took >= SHORT && took < LONG / 2 }, "{took:?}");
    }
}

#[test]
fn missing_ranks_are_named_when_the_time_is_over() {
    let [zero, one, two] = [listen(), listen(), listen()];
    let peers = [zero.address(), one.address(), two.address()];
    // Rank 1 is not there at all; rank 2 calls but nobody calls it.
    drop(one);
    let results = thread::scope(|scope| {
        let started = [(0, zero), (2, two)].map(|(rank, listener)| {
            let peers = &peers;
            scope.spawn(move || Tcp::connect(listener, &membership(rank, peers), SHORT))
        });
        started.map(|rank| rank.join().expect("no panic").expect_err("one is missing"))
    });
    let missing = results.map(|error| match error {
        CollectiveError::Meet { rank, waiting_for, missing, elapsed, .. } => {
            assert!(elapsed >= SHORT, "{rank}: {elapsed:?}");
            (rank, waiting_for, missing)
        }
        other => panic!("expected Meet, found {other:?}"),
    });
    assert_eq!((missing[0].0, &missing[0].1), (0, &vec![1]));
    assert!(missing[0].2.contains(&peers[1].to_string()) && missing[0].2.contains("refused"), "{}", missing[0].2);
    assert_eq!((missing[1].0, &missing[1].1), (2, &vec![1]));
}

#[test]
fn a_neighbour_of_another_generation_is_reported_as_such() {
    let [zero, one] = [listen(), listen()];
    let peers = [zero.address(), one.address()];
    let old = Membership { generation: 4, ..membership(1, &peers) };
    let errors = thread::scope(|scope| {
        let first = scope.spawn(|| Tcp::connect(zero, &membership(0, &peers), SHORT));
        let second = scope.spawn(|| Tcp::connect(one, &old, SHORT));
        [first, second].map(|rank| rank.join().expect("no panic").expect_err("they differ"))
    });
    for error in errors {
        let CollectiveError::Meet { missing, refused, .. } = error else { panic!("expected Meet, found {error:?}") };
        assert!(missing.contains("another generation"), "{missing}");
        assert!(refused.generation > 0, "{refused}");
    }
}

#[test]
fn an_abort_ends_the_meeting_at_once() {
    let (zero, one) = (listen(), listen());
    let peers = [zero.address(), one.address()];
    let handle = zero.abort_handle();
    let began = Instant::now();
    let result = thread::scope(|scope| {
        let meeting = scope.spawn(|| Tcp::connect(zero, &membership(0, &peers), LONG));
        handle.abort().expect("aborted");
        meeting.join().expect("no panic")
    });
    assert!(matches!(result, Err(CollectiveError::Aborted)), "{result:?}");
    assert!(began.elapsed() < LONG / 2);
}

#[test]
fn a_rank_outside_the_world_and_a_taken_port_are_refused() {
    let (zero, other) = (listen(), listen());
    let peers = [zero.address()];
    assert!(matches!(Tcp::connect(other, &membership(1, &peers), LONG), Err(CollectiveError::Rank { rank: 1, world: 1 })));
    let nobody = Membership { world: 0, ..membership(0, &peers) };
    assert!(matches!(Tcp::connect(listen(), &nobody, LONG), Err(CollectiveError::Rank { rank: 0, world: 0 })));
    match Listener::bind(zero.address()) {
        Err(CollectiveError::Bind { address, .. }) => assert_eq!(address, zero.address()),
        other => panic!("expected Bind, found {other:?}"),
    }
}

/// The connection from rank 0, whose greeting is answered as rank 1 does.
fn answer_rank_0(fake: &Listener) -> TcpStream {
    fake.socket.set_nonblocking(false).expect("a socket option");
    let (mut from_zero, _) = fake.socket.accept().expect("rank 0 calls");
    let mut hello = [0; Hello::LEN];
    from_zero.read_exact(&mut hello).expect("a greeting");
    let said = Hello::decode(&hello).expect("a greeting").nonce;
    from_zero.write_all(&GOOD.encode(&Key::new(&SESSION), Some(said))).expect("room in the buffer");
    from_zero
}

/// As one that is late finds it: its neighbour had no answer in time, and will call again.
#[test]
fn a_call_that_was_given_up_does_not_close_the_ring() {
    let (zero, fake) = (listen(), listen());
    let peers = [zero.address(), fake.address()];
    TcpStream::connect(peers[0]).and_then(|mut stream| stream.write_all(&spoken(GOOD, SESSION))).expect("room in the buffer");
    thread::scope(|scope| {
        let real = scope.spawn(|| Tcp::connect(zero, &membership(0, &peers), LONG));
        let mut from_zero = answer_rank_0(&fake);
        from_zero.set_read_timeout(Some(SHORT)).expect("a socket option");
        from_zero.read(&mut [0]).expect_err("rank 1 is waited for");
        let again = Hello { nonce: [4; 16], ..GOOD };
        let (to_zero, answer) = call(peers[0], &spoken(again, SESSION));
        assert_eq!(answer.map(|answer| answer.verdict), Some(None));
        from_zero.set_read_timeout(Some(LONG)).expect("a socket option");
        from_zero.read_exact(&mut [0]).expect("the closing barrier");
        drop((from_zero, to_zero));
        assert!(matches!(real.join().expect("no panic"), Err(CollectiveError::PeerLost { .. })));
    });
}

/// Rank 0 of a world of two whose other rank is played by the test: the connections from it and to it.
fn with_fake_peer(play: impl FnOnce(TcpStream, TcpStream) + Send) -> Tcp {
    let (zero, fake) = (listen(), listen());
    let peers = [zero.address(), fake.address()];
    thread::scope(|scope| {
        let real = scope.spawn(|| Tcp::connect(zero, &membership(0, &peers), LONG));
        let mut from_zero = answer_rank_0(&fake);
        let (mut to_zero, answer) = call(peers[0], &spoken(GOOD, SESSION));
        assert_eq!(answer.map(|answer| answer.verdict), Some(None));
        // The closing barrier: one number, which rank 1 completes.
        let mut barrier = [0; 32 + 8];
        from_zero.read_exact(&mut barrier[..32]).expect("a header");
        to_zero.write_all(&barrier).expect("room in the buffer");
        from_zero.read_exact(&mut [0; 8]).expect("the sum");
        let ring = real.join().expect("no panic").expect("the ring closes");
        play(from_zero, to_zero);
        ring
    })
}

#[test]
fn what_is_no_frame_is_refused_and_shown() {
    let mut ring = with_fake_peer(|_, mut to_zero| to_zero.write_all(&[0xab; 32]).expect("room in the buffer"));
    match ring.sum_i64(&mut [1, 2]) {
        Err(CollectiveError::Garbled { peer: 1, found, .. }) => assert_eq!(found, "ab".repeat(32)),
        // The test's end of the connection is closed by now; both are true.
        other => panic!("expected Garbled, found {other:?}"),
    }
}

#[test]
fn a_peer_that_dies_in_the_middle_of_an_element_is_lost() {
    let mut ring = with_fake_peer(|_, mut to_zero| {
        let op = crate::reduce::Op { sequence: 1, kind: OpKind::SumF32, elements: 100 };
        to_zero.write_all(&super::hello::encode_op(&op)).expect("room in the buffer");
        to_zero.write_all(&[0; 13]).expect("room in the buffer");
    });
    let result = ring.sum_f32(&mut [1.0; 100]);
    assert!(matches!(result, Err(CollectiveError::PeerLost { rank: 1, .. })), "{result:?}");
}

/// The other end of the tests below: a process of its own, which sums until something happens to it.
#[test]
fn child() {
    let Ok(parent) = std::env::var("ELLA_REDUCE_TEST_PARENT") else { return };
    let listener = listen();
    eprintln!("ADDRESS {}", listener.address());
    let peers = [parent.parse().expect("an address"), listener.address()];
    let mut ring = Tcp::connect(listener, &membership(1, &peers), LONG).expect("the parent is there");
    while ring.sum_f32(&mut vec![1.0; 1 << 20]).is_ok() {}
}

/// A process that takes part as rank 1; killed when dropped.
struct Peer(Child);

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn with_child() -> (Tcp, Peer) {
    let listener = listen();
    let (_, module) = module_path!().split_once("::").expect("inside a crate");
    let mut child = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "--nocapture", &format!("{module}::child")])
        .env("ELLA_REDUCE_TEST_PARENT", listener.address().to_string())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("this test runs again");
    let lines = BufReader::new(child.stderr.take().expect("piped")).lines();
    let peer = Peer(child);
    let address = lines.map_while(std::io::Result::ok).find_map(|line| line.strip_prefix("ADDRESS ").map(str::to_owned));
    let peers = [listener.address(), address.expect("it prints one").parse().expect("an address")];
    (Tcp::connect(listener, &membership(0, &peers), LONG).expect("the child is there"), peer)
}

/// Sums until it fails; `then` runs on another thread once some sums have gone well.
fn sum_until_failure(ring: &mut Tcp, then: impl FnOnce() + Send) -> (CollectiveError, Duration) {
    thread::scope(|scope| {
        let (warm, wait) = mpsc::channel();
        let acted = scope.spawn(move || {
            wait.recv_timeout(LONG).expect("sums go well at first");
            then();
            Instant::now()
        });
        for sums in 0.. {
            if let Err(error) = ring.sum_f32(&mut vec![1.0; 1 << 20]) {
                return (error, acted.join().expect("no panic").elapsed());
            }
            if sums == 2 {
                warm.send(()).expect("it waits");
            }
        }
        unreachable!("the loop ends by returning");
    })
}

#[test]
fn a_killed_process_is_lost_at_once() {
    let (mut ring, mut peer) = with_child();
    ring.set_timeout(LONG);
    let (error, after) = sum_until_failure(&mut ring, || peer.0.kill().expect("it runs"));
    assert!(matches!(error, CollectiveError::PeerLost { rank: 1, .. }), "{error}");
    assert!(after < Duration::from_secs(5), "{after:?}");
}

#[test]
fn a_stopped_process_is_named_when_the_time_is_over() {
    let (mut ring, peer) = with_child();
    ring.set_timeout(Duration::from_millis(500));
    let pid = i32::try_from(peer.0.id()).expect("a process id");
    // SAFETY: sends a signal to a child that is not waited for before `peer` is dropped, so that the id is still its own.
    let stop = || assert_eq!(unsafe { libc::kill(pid, libc::SIGSTOP) }, 0);
    let (error, _) = sum_until_failure(&mut ring, stop);
    assert!(matches!(error, CollectiveError::Timeout { rank: 0, waiting_for: 1, .. }), "{error}");
}
