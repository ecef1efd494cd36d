//! What goes over a connection besides data: the greeting, once, and a header before each operation's data.
//!
//! A greeting proves that its sender knows the generation's secret, which the coordinator hands out and nobody sends here: it is a keyed hash
//! over the greeting and a nonce, and in an answer over the caller's nonce too. Data is hidden and proved only where the connection is under TLS;
//! there the keys of greetings are the session's own, so that nobody can say on in one session what was said in another.

use crate::reduce::{Op, OpKind};

/// Tells this protocol, and this machine's byte order, from anything else: it is sent in native order.
const MAGIC: u64 = 0x656c_6c61_7269_6e67;
/// Raised when frames change.
const VERSION: u32 = 3;
/// What any TLS that calls says first: a record of its handshake.
const TLS: [u8; 2] = [22, 3];
/// What makes these keys of the session's bytes, and no others.
const CONTEXT: &str = "ella 2026-11-26 ella-reduce greeting";
/// Bytes before the proof.
const SAID: usize = 52;

/// A number that no other greeting has.
pub(super) type Nonce = [u8; 16];

/// A new one.
pub(super) fn nonce() -> std::io::Result<Nonce> {
    let mut nonce = Nonce::default();
    std::fs::File::open("/dev/urandom").and_then(|mut file| std::io::Read::read_exact(&mut file, &mut nonce))?;
    Ok(nonce)
}

/// What the ranks of one generation know, and nobody else.
#[derive(Clone)]
pub(super) struct Key([u8; 32]);

impl Key {
    pub(super) fn new(session: &[u8; 16]) -> Self {
        Self(blake3::derive_key(CONTEXT, session))
    }

    /// The one for a session of TLS, by what that has and no other. No proof is over as few bytes as this.
    pub(super) fn within(&self, binding: &[u8; 32]) -> Self {
        Self(*blake3::keyed_hash(&self.0, binding).as_bytes())
    }

    fn proof(&self, said: &[u8], answered: Option<Nonce>) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(said);
        if let Some(nonce) = answered {
            hasher.update(&nonce);
        }
        hasher.finalize()
    }
}

/// The greeting of both sides: the caller's, and the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hello {
    pub(super) nonce: Nonce,
    pub(super) generation: u64,
    pub(super) world: u32,
    /// The sender.
    pub(super) from: u32,
    /// Who the sender thinks it talks to.
    pub(super) to: u32,
    /// In an answer, why the caller is refused, if it is.
    pub(super) verdict: Option<Refusal>,
}

/// Why a caller is sent away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// Not this protocol at all. Never sent: such a caller gets no answer.
    Garbage,
    /// Another version of this protocol.
    Version,
    /// It does not prove the generation's secret: another run, or a stranger, or a greeting that was heard before.
    Session,
    /// Another generation of this run.
    Generation,
    /// Not the rank that is awaited here.
    Rank,
    /// It speaks TLS, and this rank does not. The answer, in clear text, tells it so.
    Tls,
    /// It does not speak TLS, and this rank does. Never sent: an alert of TLS tells it.
    Clear,
    /// One side does not take the other's certificate. Never sent: an alert tells it.
    Handshake,
}

impl Refusal {
    const ALL: [Self; 8] =
        [Self::Garbage, Self::Version, Self::Session, Self::Generation, Self::Rank, Self::Tls, Self::Clear, Self::Handshake];

    pub(super) fn reason(self) -> &'static str {
        match self {
            Self::Garbage => "not the ella-reduce protocol",
            Self::Version => "another protocol version",
            Self::Session => "another run, or a stranger",
            Self::Generation => "another generation",
            Self::Rank => "an unexpected rank or world size",
            Self::Tls => "one that speaks TLS, which this rank has no certificates for",
            Self::Clear => "one that does not speak TLS, as this rank does",
            Self::Handshake => "one whose certificate will not do, or that does not take this rank's",
        }
    }
}

impl Hello {
    pub(super) const LEN: usize = SAID + blake3::OUT_LEN;

    /// With its proof. `answered`: the nonce of the greeting that it answers, if it is an answer.
    pub(super) fn encode(&self, key: &Key, answered: Option<Nonce>) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        out[..8].copy_from_slice(&MAGIC.to_ne_bytes());
        out[8..12].copy_from_slice(&VERSION.to_ne_bytes());
        out[12..28].copy_from_slice(&self.nonce);
        out[28..36].copy_from_slice(&self.generation.to_ne_bytes());
        let verdict = self.verdict.map_or(0, |refusal| 1 + refusal as u32);
        for (place, field) in out[36..SAID].chunks_exact_mut(4).zip([self.world, self.from, self.to, verdict]) {
            place.copy_from_slice(&field.to_ne_bytes());
        }
        let proof = key.proof(&out[..SAID], answered);
        out[SAID..].copy_from_slice(proof.as_bytes());
        out
    }

    /// Whether these bytes were sent by one that knows the secret. The comparison takes the same time whatever differs.
    pub(super) fn is_proven(bytes: &[u8; Self::LEN], key: &Key, answered: Option<Nonce>) -> bool {
        let (said, proof) = bytes.split_at(SAID);
        blake3::Hash::from_slice(proof).is_ok_and(|proof| proof == key.proof(said, answered))
    }

    pub(super) fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, Refusal> {
        let mut fields = Fields(bytes);
        if u64::from_ne_bytes(fields.take()) != MAGIC {
            return Err(if bytes.starts_with(&TLS) { Refusal::Tls } else { Refusal::Garbage });
        }
        if u32::from_ne_bytes(fields.take()) != VERSION {
            return Err(Refusal::Version);
        }
        let (nonce, generation) = (fields.take(), u64::from_ne_bytes(fields.take()));
        let [world, from, to, verdict] = [0; 4].map(|_| u32::from_ne_bytes(fields.take()));
        let verdict = match verdict {
            0 => None,
            code => Some(*Refusal::ALL.get(code as usize - 1).ok_or(Refusal::Garbage)?),
        };
        Ok(Self { nonce, generation, world, from, to, verdict })
    }

    /// Whether `other`, sent to this rank, comes from the rank `awaited` of the same generation.
    pub(super) fn judge(&self, other: &Self, awaited: u32) -> Result<(), Refusal> {
        if other.generation != self.generation {
            Err(Refusal::Generation)
        } else if (other.world, other.from, other.to) != (self.world, awaited, self.from) {
            Err(Refusal::Rank)
        } else {
            Ok(())
        }
    }
}

/// The length of an operation's header.
pub(super) const HEADER: usize = 32;

/// The header of an operation: what the sender is doing.
pub(super) fn encode_op(op: &Op) -> [u8; HEADER] {
    let (kind, root) = match op.kind {
        OpKind::SumI64 => (0, 0),
        OpKind::SumF32 => (1, 0),
        OpKind::Broadcast { root } => (2, root),
        OpKind::Barrier => (3, 0),
        OpKind::SumBf16 => (4, 0),
    };
    let mut out = [0; HEADER];
    out[..8].copy_from_slice(&MAGIC.to_ne_bytes());
    out[8..16].copy_from_slice(&op.sequence.to_ne_bytes());
    out[16..24].copy_from_slice(&op.elements.to_ne_bytes());
    out[24..28].copy_from_slice(&u32::to_ne_bytes(kind));
    out[28..].copy_from_slice(&root.to_ne_bytes());
    out
}

/// Reads a header; none when it is not one.
pub(super) fn decode_op(bytes: &[u8; HEADER]) -> Option<Op> {
    let mut fields = Fields(bytes);
    let [magic, sequence, elements] = [0; 3].map(|_| u64::from_ne_bytes(fields.take()));
    let [kind, root] = [0; 2].map(|_| u32::from_ne_bytes(fields.take()));
    let kind = match kind {
        0 => OpKind::SumI64,
        1 => OpKind::SumF32,
        2 => OpKind::Broadcast { root },
        3 => OpKind::Barrier,
        4 => OpKind::SumBf16,
        _ => return None,
    };
    (magic == MAGIC).then_some(Op { sequence, kind, elements })
}

/// Reads fields one after another from a buffer that holds them all.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut field = [0; N];
        let (head, rest) = self.0.split_at(N.min(self.0.len()));
        field[..head.len()].copy_from_slice(head);
        self.0 = rest;
        field
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const HELLO: Hello = Hello { nonce: [7; 16], generation: 3, world: 4, from: 1, to: 2, verdict: None };

    #[test]
    fn greetings_come_back_as_they_were_sent() {
        let verdicts = Refusal::ALL.map(Some).into_iter().chain([None]);
        for hello in verdicts.map(|verdict| Hello { verdict, ..HELLO }) {
            assert_eq!(Hello::decode(&hello.encode(&Key::new(&[1; 16]), None)), Ok(hello));
        }
    }

    #[test]
    fn only_who_knows_the_secret_proves_a_greeting_and_an_answer_is_to_one_greeting() {
        let (key, other) = (Key::new(&[1; 16]), Key::new(&[2; 16]));
        let [here, there] = [3, 4].map(|session| key.within(&[session; 32]));
        let under_tls = HELLO.encode(&here, None);
        assert!(Hello::is_proven(&under_tls, &here, None));
        let (call, answer) = (HELLO.encode(&key, None), HELLO.encode(&key, Some([9; 16])));
        assert!(Hello::is_proven(&call, &key, None) && Hello::is_proven(&answer, &key, Some([9; 16])));
        for (bytes, key, answered) in
            [(call, &other, None), (call, &key, Some([9; 16])), (answer, &key, None), (answer, &key, Some([8; 16]))].into_iter().chain([
                (under_tls, &there, None),
                (under_tls, &key, None),
                (call, &here, None),
            ])
        {
            assert!(!Hello::is_proven(&bytes, key, answered));
        }
        for at in 0..Hello::LEN {
            let mut bad = call;
            bad[at] ^= 1;
            assert!(!Hello::is_proven(&bad, &key, None), "byte {at}");
        }
        assert!(!call.windows(16).any(|bytes| bytes == [1; 16]), "the secret is not sent");
        assert_ne!(nonce().unwrap(), nonce().unwrap());
    }

    #[test]
    fn what_is_no_greeting_is_refused_whatever_byte_differs() {
        let good = HELLO.encode(&Key::new(&[1; 16]), None);
        for (at, refusal) in
            [(0, Refusal::Garbage), (7, Refusal::Garbage), (8, Refusal::Version), (11, Refusal::Version), (51, Refusal::Garbage)]
        {
            let mut bad = good;
            bad[at] ^= 0xff;
            assert_eq!(Hello::decode(&bad), Err(refusal), "byte {at}");
        }
    }

    #[test]
    fn only_the_awaited_rank_of_this_generation_is_let_in() {
        let me = Hello { from: 2, to: 3, ..HELLO };
        assert_eq!(me.judge(&HELLO, 1), Ok(()));
        let cases = [
            (Hello { generation: 2, ..HELLO }, Refusal::Generation),
            (Hello { generation: 4, ..HELLO }, Refusal::Generation),
            (Hello { world: 5, ..HELLO }, Refusal::Rank),
            (Hello { from: 0, ..HELLO }, Refusal::Rank),
            (Hello { to: 3, ..HELLO }, Refusal::Rank),
        ];
        for (other, refusal) in cases {
            assert_eq!(me.judge(&other, 1), Err(refusal), "{other:?}");
        }
    }

    #[test]
    fn headers_come_back_as_they_were_sent_and_others_do_not() {
        for kind in [OpKind::SumI64, OpKind::SumF32, OpKind::SumBf16, OpKind::Broadcast { root: 3 }, OpKind::Barrier] {
            let op = Op { sequence: 12, kind, elements: 1 << 40 };
            let mut bytes = encode_op(&op);
            assert_eq!(decode_op(&bytes), Some(op));
            bytes[24] ^= 0x80;
            assert_eq!(decode_op(&bytes), None);
        }
        assert_eq!(decode_op(&[0; HEADER]), None);
    }
}
