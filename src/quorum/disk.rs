//! The store of one voter: one file, one thread, and a deadline on every call.
//!
//! Calls run off the async threads. One that takes longer than its limit means a disk that
//! hangs; going on would leave a leader that neither works nor yields, so the process ends
//! and the other voters take over.

use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use dc_core::codes::Code;
use dc_core::fail::{Exit, Fail};
use dc_core::ids::SiteId;
use redb::{Database, Durability, ReadableDatabase, TableDefinition};
use tokio::sync::oneshot;

/// How long one call may take.
pub(crate) const CALL_LIMIT: Duration = Duration::from_secs(2);

/// Memory for pages of the file, in bytes.
const CACHE: usize = 16 * 1024 * 1024;

/// Entries by index, as JSON.
pub(crate) const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");
/// Everything else by its word, as JSON or bytes.
pub(crate) const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
/// Which store each other voter showed when it joined.
pub(crate) const STORES: TableDefinition<'_, &str, &str> = TableDefinition::new("stores");

/// What is called, once, when this voter cannot go on: the engine died or its disk hangs.
pub type OnDeath = Arc<dyn Fn(&str) + Send + Sync>;

/// Ends the process at once, leaving the log as it is.
pub fn abort() -> OnDeath {
    Arc::new(|why| {
        tracing::error!(why, "the quorum engine cannot go on; the process ends");
        std::process::abort();
    })
}

/// Why a call to the store has no result.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiskError {
    #[error("the store failed: {0}")]
    Store(#[from] redb::Error),
    #[error("the store holds something that cannot be read: {0}")]
    Content(#[from] serde_json::Error),
    #[error("the store did not answer within {0:?}")]
    Stalled(Duration),
    #[error("the store is closed")]
    Closed,
}

type Job = Box<dyn FnOnce(Option<&Database>) + Send>;
enum Order {
    Run(Job),
    Close(oneshot::Sender<()>),
}

/// A handle on the store's thread.
#[derive(Clone)]
pub(crate) struct Disk {
    orders: mpsc::Sender<Order>,
    limit: Duration,
    on_death: OnDeath,
}

impl Disk {
    /// Opens or makes the file, for the one process that may hold it.
    ///
    /// Errors: DC-0111 when it cannot be, or is held by another process.
    pub fn open(path: &Path, limit: Duration, on_death: OnDeath) -> Result<Self, Fail> {
        let failed = |why: String| {
            let what = format!("the store {} cannot be opened", path.display());
            Fail::new(Code::from_text("DC-0111"), Exit::Unexpected, what, why).next("dc-switch config check")
        };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(|e| failed(e.to_string()))?;
        }
        if !path.exists() {
            make(path).map_err(&failed)?;
        }
        let database = builder().open(path).map_err(|e| failed(e.to_string()))?;
        Self::over(database, limit, on_death).map_err(failed)
    }

    /// Puts a thread before an open file.
    ///
    /// Errors: in words, when the file or the thread cannot be had.
    pub fn over(database: Database, limit: Duration, on_death: OnDeath) -> Result<Self, String> {
        make_tables(&database).map_err(|e| e.to_string())?;
        let (orders, todo) = mpsc::channel::<Order>();
        let thread = std::thread::Builder::new().name("quorum-store".into());
        thread.spawn(move || work(database, &todo)).map_err(|e| e.to_string())?;
        Ok(Self { orders, limit, on_death })
    }

    /// Runs one call on the store's thread.
    ///
    /// Errors: the call's own; `Stalled` past the limit, after `on_death` was called.
    pub async fn run<T, F>(&self, what: &'static str, call: F) -> Result<T, DiskError>
    where
        T: Send + 'static,
        F: FnOnce(&Database) -> Result<T, DiskError> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(move |database| {
            let result = database.map_or(Err(DiskError::Closed), call);
            drop(answer.send(result)); // nobody waits any more: the caller was dropped
        });
        self.orders.send(Order::Run(job)).map_err(|_| DiskError::Closed)?;
        if let Ok(answer) = tokio::time::timeout(self.limit, answered).await {
            return answer.unwrap_or(Err(DiskError::Closed));
        }
        (self.on_death)(&format!("DC-0112: the disk did not {what} within {:?}", self.limit));
        Err(DiskError::Stalled(self.limit))
    }

    /// Closes the file, after the calls already made. Later calls answer `Closed`.
    pub async fn close(&self) {
        let (closed, wait) = oneshot::channel();
        if self.orders.send(Order::Close(closed)).is_ok() {
            drop(tokio::time::timeout(self.limit, wait).await); // a hung disk is not waited for
        }
    }

    /// Tells whoever started the engine that it cannot go on.
    pub fn die(&self, why: &str) {
        (self.on_death)(why);
    }
}

/// Makes the file under another name first, so that it is there whole or not at all.
fn make(path: &Path) -> Result<(), String> {
    let draft = path.with_extension("draft");
    if draft.exists() {
        std::fs::remove_file(&draft).map_err(|e| e.to_string())?; // left by a start that died here
    }
    let database = builder().create(&draft).map_err(|e| e.to_string())?;
    make_tables(&database).map_err(|e| e.to_string())?;
    drop(database);
    std::fs::rename(&draft, path).map_err(|e| e.to_string())?;
    let folder = path.parent().ok_or("it has no folder")?;
    std::fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(|e| e.to_string())
}

/// How the file is opened: the log is short, so a small cache holds all of it.
pub(crate) fn builder() -> redb::Builder {
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE);
    builder
}

fn work(database: Database, todo: &mpsc::Receiver<Order>) {
    let mut database = Some(database);
    while let Ok(order) = todo.recv() {
        match order {
            Order::Run(job) => job(database.as_ref()),
            Order::Close(closed) => {
                database = None;
                closed.send(()).ok();
            }
        }
    }
}

fn make_tables(database: &Database) -> Result<(), redb::Error> {
    let mut change = database.begin_write()?;
    change.set_durability(Durability::Immediate)?;
    change.open_table(LOG)?;
    change.open_table(META)?;
    change.open_table(STORES)?;
    change.commit()?;
    Ok(())
}

/// Makes one durable change.
///
/// Errors: the store's; then nothing of it stands.
pub(crate) fn change<T>(
    database: &Database,
    body: impl FnOnce(&redb::WriteTransaction) -> Result<T, DiskError>,
) -> Result<T, DiskError> {
    let mut change = database.begin_write().map_err(redb::Error::from)?;
    change.set_durability(Durability::Immediate).map_err(redb::Error::from)?;
    let result = body(&change)?;
    change.commit().map_err(redb::Error::from)?;
    Ok(result)
}

/// Reads one word of `META`.
///
/// Errors: the store's.
pub(crate) fn read_meta(database: &Database, word: &str) -> Result<Option<Vec<u8>>, DiskError> {
    let read = database.begin_read().map_err(redb::Error::from)?;
    let table = read.open_table(META).map_err(redb::Error::from)?;
    let found = table.get(word).map_err(redb::Error::from)?;
    Ok(found.map(|value| value.value().to_vec()))
}

/// Sets one word of `META` within a change.
///
/// Errors: the store's.
pub(crate) fn set_meta(change: &redb::WriteTransaction, word: &str, value: &[u8]) -> Result<(), DiskError> {
    let mut table = change.open_table(META).map_err(redb::Error::from)?;
    table.insert(word, value).map_err(redb::Error::from)?;
    Ok(())
}

/// What a store says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StoreFacts {
    /// Made with the file; another file is another store.
    pub store: String,
    /// Which start of the agent this is; rises with every opening.
    pub life: u64,
    /// Whether every other voter has admitted this store.
    pub admitted: bool,
    /// Stores of the others, as they showed them.
    pub others: std::collections::BTreeMap<String, String>,
}

/// Reads what the store is, making it this site's when it is new.
///
/// Errors: `Content` when it belongs to another site.
pub(crate) async fn introduce(disk: &Disk, site: &SiteId) -> Result<Result<StoreFacts, String>, DiskError> {
    let site = site.to_string();
    disk.run("read what it is", move |database| {
        let owner = text(read_meta(database, "site")?);
        if owner.as_ref().is_some_and(|owner| *owner != site) {
            return Ok(Err(owner.unwrap_or_default()));
        }
        let store = text(read_meta(database, "store")?).unwrap_or_else(|| ulid::Ulid::new().to_string());
        let life = text(read_meta(database, "life")?).and_then(|n| n.parse().ok()).unwrap_or(0_u64) + 1;
        let admitted = read_meta(database, "admitted")?.is_some();
        change(database, |change| {
            set_meta(change, "site", site.as_bytes())?;
            set_meta(change, "store", store.as_bytes())?;
            set_meta(change, "life", life.to_string().as_bytes())
        })?;
        Ok(Ok(StoreFacts { store, life, admitted, others: stores(database)? }))
    })
    .await
}

fn stores(database: &Database) -> Result<std::collections::BTreeMap<String, String>, DiskError> {
    use redb::ReadableTable;
    let read = database.begin_read().map_err(redb::Error::from)?;
    let table = read.open_table(STORES).map_err(redb::Error::from)?;
    let mut found = std::collections::BTreeMap::new();
    for row in table.iter().map_err(redb::Error::from)? {
        let (site, store) = row.map_err(redb::Error::from)?;
        found.insert(site.value().to_owned(), store.value().to_owned());
    }
    Ok(found)
}

fn text(bytes: Option<Vec<u8>>) -> Option<String> {
    bytes.and_then(|bytes| String::from_utf8(bytes).ok())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn counting() -> (OnDeath, Arc<AtomicU32>) {
        let deaths = Arc::new(AtomicU32::new(0));
        let count = deaths.clone();
        (Arc::new(move |_| _ = count.fetch_add(1, Ordering::SeqCst)), deaths)
    }

    #[tokio::test]
    async fn a_disk_that_hangs_is_reported_once_its_limit_has_passed() {
        let folder = tempfile::tempdir().unwrap();
        let (on_death, deaths) = counting();
        let disk = Disk::open(&folder.path().join("q"), Duration::from_millis(50), on_death).unwrap();
        let (release, held) = mpsc::channel::<()>();
        let hung = disk.run("save a vote", move |_| {
            held.recv().ok();
            Ok(())
        });
        assert!(matches!(hung.await, Err(DiskError::Stalled(_))));
        assert_eq!(deaths.load(Ordering::SeqCst), 1);
        release.send(()).unwrap();
        disk.close().await;
        assert!(matches!(disk.run("read", |_| Ok(())).await, Err(DiskError::Closed)));
    }

    #[tokio::test]
    async fn a_store_keeps_its_name_and_counts_its_lives() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("q");
        let rome = SiteId::new("rome").unwrap();
        let mut seen = Vec::new();
        for _ in 0..2 {
            let disk = Disk::open(&path, CALL_LIMIT, counting().0).unwrap();
            seen.push(introduce(&disk, &rome).await.unwrap().unwrap());
            disk.close().await;
        }
        assert_eq!((seen[0].life, seen[1].life), (1, 2));
        assert_eq!(seen[0].store, seen[1].store);
        let disk = Disk::open(&path, CALL_LIMIT, counting().0).unwrap();
        let other = introduce(&disk, &SiteId::new("fra").unwrap()).await.unwrap();
        assert_eq!(other, Err("rome".to_owned()));
    }

    #[test]
    fn a_store_is_held_by_one_process_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("q");
        let _first = Disk::open(&path, CALL_LIMIT, counting().0).unwrap();
        let second = Disk::open(&path, CALL_LIMIT, counting().0).err().unwrap();
        assert_eq!(second.code.as_str(), "DC-0111");
    }
}
