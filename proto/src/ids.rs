//! Numbers that name things. Each is its own type, so that a step is never taken for a term.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id!(/// The number of a coordinator incarnation (TERM). The first is 1.
    Term(u64));
id!(/// One membership. The first of a term is 1.
    Generation(u64));
id!(/// A worker's place in a generation.
    Rank(u32));
id!(/// How many optimizer updates have been applied.
    Step(u64));
