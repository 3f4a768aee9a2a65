//! An epoch never falls, and another site holds the group only in a higher one.

use super::{Marks, Sight};

pub(super) fn check(before: &Marks, now: &Sight<'_>) -> Vec<String> {
    let (Some((epoch, holder)), Some(group)) = (&before.activation, now.known()) else {
        return Vec::new();
    };
    if group.epoch < *epoch {
        return vec![format!("epoch fell from {epoch} to {}", group.epoch)];
    }
    if group.epoch == *epoch && group.holder != *holder {
        return vec![format!("{} and {holder} both hold epoch {epoch}", group.holder)];
    }
    Vec::new()
}
