//! The same command line at a terminal: asked, answered, redrawn.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::fake::World;

/// A command at a terminal of its own.
struct Terminal {
    child: std::process::Child,
    keys: std::fs::File,
    shown: mpsc::Receiver<Vec<u8>>,
    text: String,
}

impl Terminal {
    fn open(context: &Path, words: &[&str]) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let size = Winsize { ws_row: 40, ws_col: 110, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&master, size).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
        let end = || OpenOptions::new().read(true).write(true).open(&name).unwrap();
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_dc-switch"));
        command.args(words).env("DC_SWITCH_CONFIG", context).env("TERM", "xterm").env_remove("NO_COLOR");
        let child = command.stdin(end()).stdout(end()).stderr(end()).spawn().unwrap();
        let keys = std::fs::File::from(master);
        let mut from = keys.try_clone().unwrap();
        let (into, shown) = mpsc::channel();
        std::thread::spawn(move || {
            let mut some = [0; 4096];
            // reading fails once the last writer has closed the terminal
            while let Ok(n @ 1..) = from.read(&mut some) {
                if into.send(some[..n].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self { child, keys, shown, text: String::new() }
    }

    /// Waits until the terminal has shown something.
    fn wait(&mut self, word: &str) {
        let limit = Instant::now() + crate::LIMIT;
        while !self.text.contains(word) {
            let left = limit.saturating_duration_since(Instant::now());
            let more =
                self.shown.recv_timeout(left).unwrap_or_else(|_| panic!("{word:?} not in:\n{}", self.text));
            self.text.push_str(&String::from_utf8_lossy(&more));
        }
    }

    fn keys(&mut self, text: &str) {
        self.keys.write_all(text.as_bytes()).unwrap();
    }

    fn end(mut self) -> (i32, String) {
        let code = self.child.wait().unwrap().code().unwrap_or(-1);
        while let Ok(more) = self.shown.recv_timeout(Duration::from_millis(300)) {
            self.text.push_str(&String::from_utf8_lossy(&more));
        }
        (code, self.text)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_site_is_typed_and_the_run_is_drawn() {
    let (world, _agents, context) = World::running().await;
    world.script(|script| script.pace = Duration::from_millis(40));
    let (code, text) = tokio::task::spawn_blocking(move || {
        let mut terminal = Terminal::open(&context, &["switchover", "orders", "--to", "fra"]);
        terminal.wait("Type the site to ACTIVATE: ");
        assert!(terminal.text.contains("You are olga (operator)."), "{}", terminal.text);
        assert!(terminal.text.contains("ACTIVE rome becomes standby; fra becomes ACTIVE"));
        terminal.keys("fra\n");
        terminal.wait("Ctrl-C detaches, the run goes on.");
        terminal.end()
    })
    .await
    .unwrap();
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("point of no return") && text.contains("DONE"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_word_begins_nothing() {
    let (world, _agents, context) = World::running().await;
    let (code, text) = tokio::task::spawn_blocking(move || {
        let mut terminal = Terminal::open(&context, &["switchover", "orders", "--to", "fra"]);
        terminal.wait("Type the site to ACTIVATE: ");
        terminal.keys("rome\n");
        terminal.end()
    })
    .await
    .unwrap();
    assert_eq!(code, 9, "{text}");
    assert!(text.contains("DC-0009") && world.state().runs.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn no_input_asks_nobody_even_at_a_terminal() {
    let (world, _agents, context) = World::running().await;
    let (code, text) = tokio::task::spawn_blocking(move || {
        Terminal::open(&context, &["switchover", "orders", "--to", "fra", "--no-input"]).end()
    })
    .await
    .unwrap();
    assert!(code == 9 && text.contains("--confirm fra"), "{text}");
    assert!(world.state().runs.is_empty());
}
