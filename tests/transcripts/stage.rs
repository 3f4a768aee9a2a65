//! The stage on which a story is played: one command a line, one line an event.

use std::fmt::Write;

use dc_core::act::Finding;
use dc_core::codes::Code;
use dc_core::ids::{PlaneKind, RunId, SiteId};
use dc_core::registry::{Answer, Entry};
use dc_core::run::Trouble;
use dc_core::script::{Bench, Scripted};

struct Stage {
    bench: Bench,
    run: RunId,
    plan: String,
    told: usize,
    out: String,
}

/// Plays a story and tells what happened.
pub fn play(told: &str) -> String {
    let mut stage = Stage {
        bench: Bench::default(),
        run: RunId(String::new()),
        plan: String::new(),
        told: 0,
        out: String::new(),
    };
    for line in told.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')) {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        stage.command(word, rest.trim());
        stage.tell_audit();
    }
    stage.tell_end();
    stage.out
}

impl Stage {
    fn command(&mut self, word: &str, rest: &str) {
        match word {
            "sites" => self.sites(rest),
            "limit" => self.limit(rest),
            "lag" => self.lag(rest),
            "finding" => self.finding(rest),
            "fails" | "undo-fails" => {
                let (act, why) = rest.split_once(": ").unwrap();
                let trouble = Trouble { code: "DC-0222".into(), text: why.into() };
                self.bench.script(act, word == "undo-fails", Scripted::Fails(trouble));
            }
            "silent" | "undo-silent" => self.bench.script(rest, word == "undo-silent", Scripted::Silent),
            "plan" => self.plan(rest),
            "switchover" => self.switchover(rest),
            "until" => self.until(rest),
            "finish" => self.bench.finish(),
            "overdue" => {
                self.bench.overdue();
                self.bench.finish();
            }
            "abort" => {
                let entry = Entry::Abort { run: self.run.clone(), why: rest.into() };
                self.ask("abort", entry);
            }
            "retry" => {
                let entry = Entry::Retry { run: self.run.clone() };
                self.ask("retry", entry);
                self.bench.finish();
            }
            "return" => {
                let epoch = self.bench.run(&self.run).unwrap().epoch;
                let entry = Entry::Return { run: self.run.clone(), epoch };
                self.ask("return", entry);
            }
            other => panic!("a story does not know {other:?}"),
        }
    }

    fn say(&mut self, what: &str) {
        writeln!(self.out, "{what}").unwrap();
    }

    fn ask(&mut self, word: &str, entry: Entry) {
        let answer = self.bench.propose(entry);
        self.answered(word, &answer);
    }

    fn answered(&mut self, word: &str, answer: &Answer) {
        match answer {
            Answer::Done | Answer::Release(_) => {}
            Answer::Stale => self.say(&format!("{word} came too late")),
            Answer::Refused(fail) => {
                self.say(&format!("refused {}: {}: {}", fail.code, fail.what, fail.why));
                self.say(&format!("  next: {}", fail.next));
            }
        }
    }

    fn sites(&mut self, rest: &str) {
        let planes = rest.split_whitespace().find_map(|w| w.strip_prefix("planes="));
        let named = |kind: &PlaneKind| planes.is_none_or(|p| p.split(',').any(|w| w == kind.word()));
        let planes: Vec<PlaneKind> = PlaneKind::ALL.into_iter().filter(named).collect();
        self.bench = Bench::with("orders", &planes).unwrap();
    }

    fn limit(&mut self, rest: &str) {
        let (plane, amount) = rest.split_once(' ').unwrap();
        let group = self.bench.group("orders").unwrap();
        let (mut spec, over) = (group.spec.clone(), group.spec_version);
        let (_, number) = quantity(amount);
        match plane {
            "postgres" => spec.policy.lag_bytes_max = number,
            "kafka" => spec.policy.lag_records_max = number,
            _ => spec.policy.lag_objects_max = number,
        }
        self.ask("group apply", Entry::ApplyGroup { spec: Box::new(spec), over });
    }

    fn lag(&mut self, rest: &str) {
        let [site, plane, amount] = rest.split_whitespace().collect::<Vec<_>>()[..] else {
            panic!("lag SITE PLANE AMOUNT")
        };
        let policy = &self.bench.group("orders").unwrap().spec.policy;
        let (limit, unit) = match plane {
            "postgres" => (policy.lag_bytes_max, "MB"),
            "kafka" => (policy.lag_records_max, "records"),
            _ => (policy.lag_objects_max, "objects"),
        };
        let shown = if unit == "MB" { limit / 1_000_000 } else { limit };
        let (found, number) = quantity(amount);
        if number > limit {
            let text = format!("{plane} lags {found} {unit}, limit {shown} {unit}");
            self.found(site, plane, Code::LAG_ABOVE_LIMIT.as_str(), &text, true);
        }
    }

    fn finding(&mut self, rest: &str) {
        let (head, text) = rest.split_once(": ").unwrap();
        let [site, plane, code, how] = head.split_whitespace().collect::<Vec<_>>()[..] else {
            panic!("finding SITE PLANE CODE blocks|says: TEXT")
        };
        self.found(site, plane, code, text, how == "blocks");
    }

    fn found(&mut self, site: &str, plane: &str, code: &str, text: &str, blocking: bool) {
        let plane = PlaneKind::ALL.into_iter().find(|kind| kind.word() == plane).unwrap();
        let finding = Finding {
            code: code.into(),
            plane: Some(plane),
            site: SiteId::new(site).unwrap(),
            blocking,
            text: text.into(),
        };
        let act = format!("{site} {plane}.preflight");
        self.bench.script(&act, false, Scripted::Finds(vec![finding]));
    }

    fn plan(&mut self, rest: &str) {
        let to = rest.split_once("to=").unwrap().1;
        let plan = self.bench.plan("orders", to).unwrap().unwrap();
        let mut stages: Vec<(&str, usize)> = Vec::new();
        for step in &plan.steps {
            match stages.iter_mut().find(|(word, _)| *word == step.stage.word()) {
                Some((_, many)) => *many += 1,
                None => stages.push((step.stage.word(), 1)),
            }
        }
        let stages: Vec<_> = stages.iter().map(|(word, many)| format!("{word} {many}")).collect();
        self.say(&format!("plan of {} to {}: {}", plan.group, plan.target, stages.join(", ")));
        self.plan = plan.hash();
    }

    fn switchover(&mut self, rest: &str) {
        let to = rest.split_once("to=").unwrap().1.split_whitespace().next().unwrap();
        let (run, answer) = if rest.contains("shown") {
            let shown = self.plan.clone();
            self.bench.start_planned("orders", to, &shown).unwrap()
        } else {
            self.bench.start("orders", to).unwrap()
        };
        if answer == Answer::Done {
            self.run = run;
        }
        self.answered("switchover", &answer);
    }

    fn until(&mut self, what: &str) {
        let run = self.run.clone();
        self.bench.until(|bench| match what {
            "takeover" => bench.run(&run).unwrap().taken.is_some(),
            "opened" => bench.run(&run).unwrap().taken.as_ref().is_some_and(|t| t.opened.is_some()),
            act => bench.intents().iter().any(|i| format!("{} {}", i.act.site, i.act.name) == act),
        });
    }

    /// What the audit says, but for steps that merely went as they should.
    fn tell_audit(&mut self) {
        let all: Vec<String> = self.bench.registry.audit.entries.iter().map(|e| e.what.clone()).collect();
        for what in all.iter().skip(self.told) {
            let plain = what.contains(" in 10 ms: ") && !what.contains("undo of");
            if !plain {
                self.say(what);
            }
        }
        self.told = all.len();
    }

    fn tell_end(&mut self) {
        let Some(run) = self.bench.run(&self.run).cloned() else { return };
        for finding in run.findings.iter().filter(|f| f.blocking) {
            self.say(&format!("  {} at {}: {}", finding.code, finding.site, finding.text));
        }
        if let Some(attention) = &run.attention {
            self.say(&format!("a human must look [{}]: {}", attention.code, attention.text));
        }
        let group = self.bench.group("orders").unwrap().clone();
        let end = run.ended.map_or("open".to_owned(), |e| e.result.word().to_owned());
        let opened = if group.opened { "opened" } else { "not opened" };
        self.say(&format!(
            "run {} is {end}; {} holds orders, epoch {}, {opened}",
            run.id, group.holder, group.epoch
        ));
        if !group.fences.is_empty() {
            let mut marks: Vec<_> =
                group.fences.iter().map(|f| format!("{} at {}", f.plane, f.site)).collect();
            marks.dedup();
            self.say(&format!("fenced: {}", marks.join(", ")));
        }
    }
}

/// A number with its unit, as in `18MB`: the digits as told, and what they come to.
fn quantity(text: &str) -> (String, u64) {
    let digits: String = text.chars().take_while(char::is_ascii_digit).collect();
    let number: u64 = digits.parse().unwrap();
    let times = if text.ends_with("MB") { 1_000_000 } else { 1 };
    (digits, number * times)
}
