//! The catalogue of error codes: a page per code, in `codes/`.

use std::borrow::Cow;
use std::fmt;

use serde::{Deserialize, Serialize};

static PAGES: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/pages.rs"));

/// A stable name of a cause, as in `DC-0207`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Code(Cow<'static, str>);

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        impl Code {
            $($(#[$doc])* pub const $name: Self = Self(Cow::Borrowed($text));)*
        }
    };
}

codes! {
    /// A name is not valid.
    BAD_NAME = "DC-0200",
    /// No group of that name.
    UNKNOWN_GROUP = "DC-0201",
    /// The target cannot hold the group.
    BAD_TARGET = "DC-0202",
    /// Another run holds the group.
    RUN_OPEN = "DC-0203",
    /// The plan shown is no longer the plan that would run.
    STALE_PLAN = "DC-0204",
    /// Preflight found what forbids a move.
    PREFLIGHT = "DC-0205",
    /// Two groups claim one thing.
    CLAIM_OVERLAP = "DC-0206",
    /// Lag above a limit of the policy.
    LAG_ABOVE_LIMIT = "DC-0207",
    /// No run of that name.
    UNKNOWN_RUN = "DC-0208",
    /// Too late to abort.
    PAST_TAKEOVER = "DC-0209",
    /// No way back by a return.
    NO_RETURN = "DC-0210",
    /// Nothing to retry.
    NOTHING_TO_RETRY = "DC-0211",
    /// The release was not accepted.
    RELEASE_REFUSED = "DC-0212",
    /// The group spec is not usable.
    BAD_SPEC = "DC-0214",
    /// The change of a spec is not allowed.
    SPEC_CHANGE = "DC-0215",
    /// A step failed and the run was rolled back.
    ROLLED_BACK = "DC-0216",
    /// A step after the takeover does not end; a human must look.
    NEEDS_HUMAN = "DC-0217",
    /// An entry came too late to count.
    STALE_ENTRY = "DC-0218",
    /// Sites differ in something that must be equal.
    SITES_DIFFER = "DC-0219",
}

impl Code {
    /// A code by its text, whether or not it has a page.
    pub fn from_text(text: &str) -> Self {
        Self(Cow::Owned(text.to_owned()))
    }

    /// The text, as in `DC-0207`.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The page of this code; none when the catalogue has none.
    pub fn page(&self) -> Option<&'static str> {
        PAGES.iter().find(|(code, _)| *code == self.0).map(|(_, page)| *page)
    }

    /// Every code that has a page.
    pub fn all() -> impl Iterator<Item = &'static str> {
        PAGES.iter().map(|(code, _)| *code)
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}
