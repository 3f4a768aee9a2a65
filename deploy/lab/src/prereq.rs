//! What must be true of the machine before a lab is worth starting. All that is missing is told at once.

use std::path::Path;

use anyhow::{Result, bail};

use crate::keeper;
use crate::world::{base_dir, check_name};

/// Free memory that four planes at two sites need, in MiB.
const MEMORY_MIB: u64 = 8 * 1024;
/// Free disk that the parts and their data need, in MiB.
const DISK_MIB: u64 = 6 * 1024;

/// Checks the machine for a lab of that name.
///
/// Errors: one, naming everything that is missing and what to do about it.
pub fn check(name: &str, all_planes: bool) -> Result<()> {
    let mut problems = machine(all_planes)?;
    if let Err(e) = check_name(name) {
        problems.insert(0, format!("{e:#}"));
    }
    if problems.is_empty() {
        return Ok(());
    }
    bail!("this machine cannot carry the lab; nothing was started\n  {}", problems.join("\n  "))
}

fn machine(all_planes: bool) -> Result<Vec<String>> {
    let mut problems = Vec::new();
    if !Path::new("/etc/debian_version").exists() {
        problems.push("this is no Debian-like system: missing parts are installed with apt-get".to_string());
    }
    let memory = field("/proc/meminfo", "MemAvailable:").unwrap_or(0) / 1024;
    if all_planes && memory < MEMORY_MIB {
        problems.push(format!(
            "{memory} MiB of memory are free, {MEMORY_MIB} MiB are needed (or take fewer planes: --planes)"
        ));
    }
    let disk = free_disk_mib()?;
    if disk < DISK_MIB {
        problems.push(format!(
            "{disk} MiB of disk are free at {}, {DISK_MIB} MiB are needed",
            base_dir()?.display()
        ));
    }
    let loopback = std::net::TcpListener::bind(("127.250.3.1", 0));
    if let Err(e) = loopback {
        problems.push(format!("loopback addresses 127.0.0.0/8 cannot be used: {e}"));
    } else if !keeper::has_room() {
        problems.push("on every of 127.1 to 127.250 somebody listens on a port of the lab".to_string());
    }
    for (tool, package) in [("setsid", "util-linux"), ("sha256sum", "coreutils")] {
        if which(tool).is_none() {
            problems.push(format!("{tool} is missing: apt-get install {package}"));
        }
    }
    Ok(problems)
}

/// Finds a program in PATH.
fn which(tool: &str) -> Option<std::path::PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|d| d.join(tool)).find(|p| p.is_file())
}

fn field(file: &str, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    text.lines().find_map(|l| l.strip_prefix(key))?.split_whitespace().next()?.parse().ok()
}

fn free_disk_mib() -> Result<u64> {
    let base = base_dir()?;
    let there = base.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
    let stat = rustix::fs::statvfs(there)?;
    Ok(stat.f_bavail * stat.f_frsize / (1024 * 1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_a_name_that_is_no_folder_of_its_own() {
        for bad in ["", "_parts", "../lab", "a/b", "-x", "a b", "."] {
            let told = check(bad, false).map_err(|e| format!("{e:#}")).err().unwrap_or_default();
            assert!(told.contains("nothing was started"), "{bad:?}: {told:?}");
            assert!(told.contains("lab name"), "{bad:?}: {told:?}");
        }
        assert!(check_name("ci-2_b").is_ok());
    }
}
