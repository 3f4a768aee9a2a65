//! Two ordered listings walked side by side in constant memory.

use std::cmp::Ordering;
use std::collections::VecDeque;
use std::sync::Arc;

use async_trait::async_trait;
use dc_plane::PlaneError;
use tokio::task::JoinHandle;

use crate::store::{Listed, Page, Store};

/// Where pages of a listing come from.
#[async_trait]
pub(crate) trait Pages: Send + Sync + 'static {
    /// The page that starts at a token; the first without one.
    async fn next(&self, from: Option<&str>) -> Result<Page, PlaneError>;
    /// The error for a listing that must not be believed.
    fn untrusted(&self, why: &str) -> PlaneError;
}

/// All objects of a store below a prefix.
pub(crate) struct Below {
    pub(crate) store: Store,
    pub(crate) prefix: String,
}

#[async_trait]
impl Pages for Below {
    async fn next(&self, from: Option<&str>) -> Result<Page, PlaneError> {
        self.store.page(&self.prefix, from).await
    }
    fn untrusted(&self, why: &str) -> PlaneError {
        self.store.untrusted(why)
    }
}

/// One listing, a page ahead of its reader.
pub(crate) struct Lister {
    pages: Arc<dyn Pages>,
    ready: VecDeque<Listed>,
    ahead: Option<JoinHandle<Result<Page, PlaneError>>>,
    last: Option<String>,
}

impl Lister {
    pub(crate) fn new(pages: impl Pages) -> Self {
        let pages: Arc<dyn Pages> = Arc::new(pages);
        let ahead = Some(fetch(&pages, None));
        Self { pages, ready: VecDeque::new(), ahead, last: None }
    }

    /// Makes the next object ready, unless the listing has ended.
    async fn fill(&mut self) -> Result<(), PlaneError> {
        while self.ready.is_empty() {
            let Some(ahead) = self.ahead.take() else { return Ok(()) };
            let page = ahead.await.map_err(|e| PlaneError::failed("list objects", &e))??;
            self.ahead = page.next.map(|token| fetch(&self.pages, Some(token)));
            for object in page.objects {
                if self.last.as_ref().is_some_and(|last| *last >= object.key) {
                    let why = format!("{:?} comes after {:?}", object.key, self.last);
                    return Err(self.pages.untrusted(&why));
                }
                self.last = Some(object.key.clone());
                self.ready.push_back(object);
            }
        }
        Ok(())
    }

    /// The next object in key order; none at the end.
    ///
    /// Errors: the store's own; `Refused` (DC-0510) when the listing is not ordered.
    pub(crate) async fn next(&mut self) -> Result<Option<Listed>, PlaneError> {
        self.fill().await?;
        Ok(self.ready.pop_front())
    }
}

fn fetch(pages: &Arc<dyn Pages>, from: Option<String>) -> JoinHandle<Result<Page, PlaneError>> {
    let pages = Arc::clone(pages);
    tokio::spawn(async move { pages.next(from.as_deref()).await })
}

impl Drop for Lister {
    fn drop(&mut self) {
        if let Some(ahead) = &self.ahead {
            ahead.abort();
        }
    }
}

/// One key, as each side shows it; at least one side does.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Pair {
    pub(crate) theirs: Option<Listed>,
    pub(crate) ours: Option<Listed>,
}

/// Both sides, key by key.
pub(crate) struct Join {
    theirs: Lister,
    ours: Lister,
}

impl Join {
    pub(crate) fn new(theirs: Lister, ours: Lister) -> Self {
        Self { theirs, ours }
    }

    /// The next key of either side; none when both have ended.
    ///
    /// Errors: as of the listings.
    pub(crate) async fn next(&mut self) -> Result<Option<Pair>, PlaneError> {
        let (theirs, ours) = tokio::join!(self.theirs.fill(), self.ours.fill());
        theirs?;
        ours?;
        let order = match (self.theirs.ready.front(), self.ours.ready.front()) {
            (None, None) => return Ok(None),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some(theirs), Some(ours)) => theirs.key.cmp(&ours.key),
        };
        let theirs = if order.is_le() { self.theirs.ready.pop_front() } else { None };
        let ours = if order.is_ge() { self.ours.ready.pop_front() } else { None };
        Ok(Some(Pair { theirs, ours }))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    /// A listing in memory, in pages of a given size.
    struct Held(Vec<String>, usize);

    #[async_trait]
    impl Pages for Held {
        async fn next(&self, from: Option<&str>) -> Result<Page, PlaneError> {
            let start: usize = from.map_or(Ok(0), str::parse).map_err(|_| self.untrusted("token"))?;
            let end = (start + self.1).min(self.0.len());
            let objects = self.0[start..end]
                .iter()
                .map(|k| Listed { key: k.clone(), size: 1, etag: "e".into(), modified: None })
                .collect();
            Ok(Page { objects, next: (end < self.0.len()).then(|| end.to_string()) })
        }
        fn untrusted(&self, why: &str) -> PlaneError {
            PlaneError::refused("DC-0510", why)
        }
    }

    fn walk(
        a: Vec<String>,
        b: Vec<String>,
        page: usize,
    ) -> Result<BTreeMap<String, (bool, bool)>, PlaneError> {
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread().build() else {
            return Err(PlaneError::refused("", "no runtime"));
        };
        runtime.block_on(async {
            let mut join = Join::new(Lister::new(Held(a, page)), Lister::new(Held(b, page)));
            let mut seen = BTreeMap::new();
            while let Some(pair) = join.next().await? {
                let key = pair.theirs.as_ref().or(pair.ours.as_ref()).map(|o| o.key.clone());
                seen.insert(key.unwrap_or_default(), (pair.theirs.is_some(), pair.ours.is_some()));
            }
            Ok(seen)
        })
    }

    proptest! {
        #[test]
        fn every_key_of_both_sides_is_met_once_whatever_the_pages(
            a in prop::collection::btree_set("[a-c/.-]{1,4}", 0..40),
            b in prop::collection::btree_set("[a-c/.-]{1,4}", 0..40),
            page in 1_usize..7,
        ) {
            let wanted: BTreeMap<_, _> = a.union(&b).map(|k| (k.clone(), (a.contains(k), b.contains(k)))).collect();
            let list = |set: &BTreeSet<String>| set.iter().cloned().collect::<Vec<_>>();
            prop_assert_eq!(walk(list(&a), list(&b), page), Ok(wanted));
        }
    }

    #[test]
    fn a_listing_out_of_order_is_refused() {
        let refused = walk(vec!["b".into(), "a".into()], vec![], 1);
        assert!(matches!(refused, Err(PlaneError::Refused { code, .. }) if code == "DC-0510"));
    }
}
