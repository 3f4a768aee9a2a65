//! Names and numbers by which the house knows its things.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A name that came from outside and does not fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} name {given:?} is not valid: 1 to 40 of a-z, 0-9 and '-', starting with a letter")]
pub struct BadName {
    what: &'static str,
    given: String,
}

fn checked(what: &'static str, given: &str) -> Result<String, BadName> {
    let letter_first = given.starts_with(|c: char| c.is_ascii_lowercase());
    let plain = given.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
    if letter_first && plain && given.len() <= 40 {
        Ok(given.to_owned())
    } else {
        Err(BadName { what, given: given.to_owned() })
    }
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(String);

        impl $type {
            /// Checks a name that came from outside.
            ///
            /// Errors: `BadName` when it is empty, too long or has other characters.
            pub fn new(given: &str) -> Result<Self, BadName> {
                checked($what, given).map(Self)
            }
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl TryFrom<String> for $type {
            type Error = BadName;
            fn try_from(given: String) -> Result<Self, BadName> {
                Self::new(&given)
            }
        }
        impl From<$type> for String {
            fn from(name: $type) -> String {
                name.0
            }
        }
        impl std::str::FromStr for $type {
            type Err = BadName;
            fn from_str(given: &str) -> Result<Self, BadName> {
                Self::new(given)
            }
        }
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name!(
    /// One datacenter with its agent.
    SiteId, "site"
);
name!(
    /// A failover group: planes that move together.
    GroupName, "group"
);

/// One execution of a plan: a ULID in its 26-letter text form, made by who proposes it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RunId(pub String);

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}
impl fmt::Debug for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Number of a group's activation. Only a committed entry raises it.
///
/// `incarnation` rises when a lost quorum is rebuilt, so that every old epoch is lower
/// than every new one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Epoch {
    /// Of the quorum; rises on its recovery only.
    pub incarnation: u32,
    /// Of the group; rises on every takeover.
    pub counter: u64,
}

impl Epoch {
    /// The epoch that follows in the same incarnation.
    #[must_use]
    pub fn next(self) -> Self {
        Self { counter: self.counter + 1, ..self }
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.incarnation, self.counter)
    }
}

/// Log index of a step's intent; the higher wins. Zero is below every real token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Token(pub u64);

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// One replicated system of a group. The order is the order in which people read them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PlaneKind {
    /// The databases.
    Postgres,
    /// The topics and consumer groups.
    Kafka,
    /// DAG releases and logs.
    S3,
    /// Schedulers and their tasks.
    Airflow,
}

impl PlaneKind {
    /// All planes, in reading order.
    pub const ALL: [Self; 4] = [Self::Postgres, Self::Kafka, Self::S3, Self::Airflow];

    /// The word by which people, metrics and files know this plane.
    pub fn word(self) -> &'static str {
        match self {
            Self::Postgres => "postgres",
            Self::Kafka => "kafka",
            Self::S3 => "s3",
            Self::Airflow => "airflow",
        }
    }
}

impl fmt::Display for PlaneKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.word())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_names_that_could_hide_in_a_path_or_a_query() {
        for bad in ["", "Rome", "a b", "../x", "1st", "a'b", "ü", &"x".repeat(41)] {
            assert!(SiteId::new(bad).is_err(), "{bad:?} was accepted");
        }
        assert_eq!(SiteId::new("fra-2").map(String::from).as_deref(), Ok("fra-2"));
    }

    #[test]
    fn a_new_incarnation_is_above_every_old_counter() {
        let old = Epoch { incarnation: 1, counter: 900 };
        let new = Epoch { incarnation: 2, counter: 1 };
        assert!(new > old && old.next() > old);
    }
}
