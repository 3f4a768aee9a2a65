//! The guardian: keeps a unit's processes, knows when none of them is left, and can prove it.
//!
//! It is synchronous and small, and outlives the agent. It never decides anything: it starts
//! what it is told, and ends what it is told. It restarts nothing, so that nothing comes back
//! that a fence has ended.
//!
//! | exit | meaning |
//! |---|---|
//! | 0 | done; `keep --foreground`: the unit ended with 0 |
//! | 1 | failed |
//! | 2 | the command line is wrong |
//! | 3 | a keeper of this unit lives |
//! | 4 | processes of an earlier keeper live |

mod keep;
mod reap;
mod tree;
mod unit;
mod wire;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use keep::Order;
use unit::{Fail, Unit};

const USAGE: &str = "usage:
  dc-guardian keep UNIT --dir DIR [--env-file FILE] [--log FILE] [--cwd DIR] [--cgroup DIR]
                        [--foreground] -- COMMAND...
  dc-guardian ask UNIT --dir DIR JSON      one request to a living keeper, as in '{\"do\":\"status\"}'
  dc-guardian reap UNIT --dir DIR          end what a dead keeper left, and prove the end";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match dispatch(&args) {
        Ok(code) => code,
        Err(fail) => {
            eprintln!("error: {}", fail.text);
            ExitCode::from(fail.code)
        }
    }
}

fn dispatch(args: &[String]) -> Result<ExitCode, Fail> {
    let (verb, rest) = args.split_first().ok_or_else(|| Fail::usage(USAGE))?;
    match verb.as_str() {
        "keep" => keep_verb(rest),
        "ask" => ask(&Words::read(rest, false)?),
        "reap" => {
            let words = Words::read(rest, false)?;
            let seen = reap::reap(&words.unit()?, Duration::from_secs(10))?;
            print_json(&seen)
        }
        "enter" => {
            let (leaf, rest) = rest.split_first().ok_or_else(|| Fail::usage(USAGE))?;
            keep::enter(Path::new(leaf), rest.strip_prefix(&["--".to_owned()]).unwrap_or(rest))?;
            Ok(ExitCode::SUCCESS)
        }
        "--help" | "help" => {
            println!("{USAGE}");
            Ok(ExitCode::SUCCESS)
        }
        "--version" => {
            println!("dc-guardian {}", env!("CARGO_PKG_VERSION"));
            Ok(ExitCode::SUCCESS)
        }
        other => Err(Fail::usage(format!("no command {other:?}\n{USAGE}"))),
    }
}

fn keep_verb(args: &[String]) -> Result<ExitCode, Fail> {
    let words = Words::read(args, true)?;
    let order = words.order()?;
    if words.inside {
        return Ok(keep_inside(&order));
    }
    if words.foreground {
        let ended = keep::keep(&order, |_| {})?;
        return Ok(match ended {
            Some(wire::Ended::Code(code)) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
            _ => ExitCode::FAILURE,
        });
    }
    let pid = keep::detach(&order, args)?;
    println!("{pid}");
    Ok(ExitCode::SUCCESS)
}

/// The detached keeper says one line to its starter: `ready PID` or `fail TEXT`.
fn keep_inside(order: &Order) -> ExitCode {
    // the starter may have died; the unit is kept all the same
    let say = |line: &str| {
        let mut out = std::io::stdout();
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    };
    match keep::keep(order, |pid| say(&format!("ready {pid}"))) {
        Ok(_) => ExitCode::SUCCESS,
        Err(fail) => {
            say(&format!("fail {}", fail.text.replace('\n', " ")));
            ExitCode::from(fail.code)
        }
    }
}

fn ask(words: &Words) -> Result<ExitCode, Fail> {
    let unit = words.unit()?;
    let path = unit.path("sock");
    let stream = UnixStream::connect(&path).map_err(|e| Fail::io("connect to", &path, &e))?;
    let request = words.rest.first().map_or("{\"do\":\"status\"}", String::as_str);
    writeln!(&mut &stream, "{request}").map_err(|e| Fail::io("ask", &path, &e))?;
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line).map_err(|e| Fail::io("hear", &path, &e))?;
    print!("{line}");
    Ok(if line.starts_with("{\"error\"") { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn print_json(value: &impl serde::Serialize) -> Result<ExitCode, Fail> {
    let text = serde_json::to_string(value).map_err(|e| Fail::plain(e.to_string()))?;
    println!("{text}");
    Ok(ExitCode::SUCCESS)
}

/// A command line taken apart.
#[derive(Debug, Default)]
struct Words {
    name: Option<String>,
    dir: Option<PathBuf>,
    env_file: Option<PathBuf>,
    log: Option<PathBuf>,
    cwd: Option<PathBuf>,
    cgroup: Option<PathBuf>,
    foreground: bool,
    inside: bool,
    rest: Vec<String>,
}

impl Words {
    fn read(args: &[String], keeping: bool) -> Result<Self, Fail> {
        let mut words = Self::default();
        let mut left = args.iter();
        while let Some(word) = left.next() {
            let mut value =
                || left.next().map(PathBuf::from).ok_or_else(|| Fail::usage(format!("{word} needs a value")));
            match word.as_str() {
                "--dir" => words.dir = Some(value()?),
                "--env-file" if keeping => words.env_file = Some(value()?),
                "--log" if keeping => words.log = Some(value()?),
                "--cwd" if keeping => words.cwd = Some(value()?),
                "--cgroup" if keeping => words.cgroup = Some(value()?),
                "--foreground" if keeping => words.foreground = true,
                "--inside" if keeping => words.inside = true,
                "--" => {
                    words.rest.extend(left.cloned());
                    break;
                }
                flag if flag.starts_with("--") => {
                    return Err(Fail::usage(format!("no option {flag}\n{USAGE}")));
                }
                _ if words.name.is_none() => words.name = Some(word.clone()),
                _ if !keeping => words.rest.push(word.clone()),
                extra => return Err(Fail::usage(format!("{extra:?} is too much; the command follows --"))),
            }
        }
        Ok(words)
    }

    fn unit(&self) -> Result<Unit, Fail> {
        let name = self.name.as_deref().ok_or_else(|| Fail::usage(USAGE))?;
        let dir = self.dir.as_deref().ok_or_else(|| Fail::usage("--dir is missing"))?;
        Unit::open(dir, name)
    }

    fn order(&self) -> Result<Order, Fail> {
        if self.rest.is_empty() {
            return Err(Fail::usage("no command after --"));
        }
        Ok(Order {
            unit: self.unit()?,
            env_file: self.env_file.clone(),
            log: self.log.clone(),
            cwd: self.cwd.clone(),
            cgroup: self.cgroup.clone(),
            command: self.rest.clone(),
        })
    }
}
