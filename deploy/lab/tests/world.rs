//! Labs beside each other on one machine, with real PostgreSQL pairs as their parts: they do not collide, and nothing
//! of them is left when they are taken down.

use std::path::PathBuf;
use std::process::{Command, Output};

type Tested = Result<(), Box<dyn std::error::Error>>;

/// A folder of labs that is this test's own, taken down whatever happens.
struct Labs {
    state: PathBuf,
    names: Vec<&'static str>,
}

impl Labs {
    fn new(test: &str, names: &[&'static str]) -> Self {
        let state = std::env::temp_dir().join(format!("dc-lab-test-{test}-{}", std::process::id()));
        Self { state, names: names.to_vec() }
    }

    fn lab(&self, args: &[&str]) -> std::io::Result<Output> {
        Command::new(env!("CARGO_BIN_EXE_dc-lab")).args(args).env("DC_LAB_STATE", &self.state).output()
    }

    fn up(&self, name: &str) -> Tested {
        let out = self.lab(&["parts", "up", "--name", name, "--planes", "postgres"])?;
        if out.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&out.stderr).into()) }
    }

    fn down(&self, name: &str) -> Tested {
        let out = self.lab(&["down", "--purge", "--name", name])?;
        if out.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&out.stderr).into()) }
    }

    fn number(&self, name: &str) -> Result<u64, Box<dyn std::error::Error>> {
        let saved: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(self.state.join(name).join("world.json"))?)?;
        saved["number"].as_u64().ok_or_else(|| "no number".into())
    }

    /// Command lines of the machine that name this test's folder, its own commands excepted.
    fn living(&self) -> Vec<String> {
        let Ok(dir) = std::fs::read_dir("/proc") else { return Vec::new() };
        let lines = dir.filter_map(|e| std::fs::read(e.ok()?.path().join("cmdline")).ok());
        let lines = lines.map(|l| String::from_utf8_lossy(&l).replace('\0', " "));
        lines.filter(|l| l.contains(&*self.state.to_string_lossy())).collect()
    }
}

impl Drop for Labs {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = self.down(name); // down already, most of the time
        }
        let _ = std::fs::remove_dir_all(&self.state);
    }
}

fn answers(number: u64) -> bool {
    let address = std::net::SocketAddr::from(([127, u8::try_from(number).unwrap_or(0), 1, 1], 25432));
    std::net::TcpStream::connect(address).is_ok()
}

#[test]
fn labs_beside_each_other_do_not_collide_and_leave_nothing() -> Tested {
    let labs = Labs::new("beside", &["one", "two"]);
    labs.up("one")?;
    labs.up("two")?;
    let (one, two) = (labs.number("one")?, labs.number("two")?);
    assert_ne!(one, two);
    assert!(answers(one) && answers(two));
    labs.down("one")?;
    assert!(!answers(one), "lab one still answers");
    assert!(answers(two), "taking lab one down ended a part of lab two");
    labs.down("two")?;
    assert_eq!(labs.living(), Vec::<String>::new());
    assert!(!labs.state.join("one").exists() && !labs.state.join("two").exists());
    Ok(())
}

#[test]
fn a_lab_that_is_up_is_found_again_by_its_name() -> Tested {
    let labs = Labs::new("again", &["one"]);
    labs.up("one")?;
    let number = labs.number("one")?;
    labs.up("one")?;
    assert_eq!(labs.number("one")?, number);
    assert!(answers(number));
    labs.down("one")?;
    labs.down("one")
}

#[test]
fn refuses_a_run_over_a_lab_that_is_up() -> Tested {
    let labs = Labs::new("over", &["one"]);
    labs.up("one")?;
    let out = labs.lab(&["run", "--name", "one", "--planes", "postgres"])?;
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success() && said.contains("is running"), "{said}");
    assert!(answers(labs.number("one")?), "the refused run ended the lab");
    labs.down("one")
}
