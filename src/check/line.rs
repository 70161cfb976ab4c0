//! What `weft check` says: one line for each thing that was looked at.

use crate::admin::render;
use nanoserde::SerJson;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Ok,
    /// It works, but not all of it, or not for long.
    Warn,
    Fail,
}

#[derive(Clone, Debug, PartialEq, Eq, SerJson)]
pub struct Line {
    pub name: String,
    /// ok, warn or fail.
    pub verdict: String,
    pub text: String,
    /// What to do; empty where all is well.
    pub remedy: String,
}

#[derive(Debug, Default, SerJson)]
pub struct Report {
    pub failed: usize,
    pub warned: usize,
    pub checks: Vec<Line>,
}

impl Report {
    pub fn push(&mut self, line: Line) {
        self.failed += usize::from(line.is(Verdict::Fail));
        self.warned += usize::from(line.is(Verdict::Warn));
        self.checks.push(line);
    }

    #[must_use]
    pub fn text(&self) -> String {
        let row = |l: &Line| {
            let remedy = if l.remedy.is_empty() { String::new() } else { [" -> ", &l.remedy].concat() };
            [l.verdict.clone(), l.name.clone(), [l.text.as_str(), &remedy].concat()]
        };
        let table = render::table(["", "", ""], self.checks.iter().map(row));
        table.trim().to_owned()
    }
}

impl Verdict {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }
}

impl Line {
    fn new(verdict: Verdict, name: &str, text: &[&str], remedy: &[&str]) -> Self {
        Self { name: name.into(), verdict: verdict.name().into(), text: text.concat(), remedy: remedy.concat() }
    }

    #[must_use]
    pub fn is(&self, verdict: Verdict) -> bool {
        self.verdict == verdict.name()
    }
}

/// All is well.
#[must_use]
pub fn ok(name: &str, text: &[&str]) -> Line {
    Line::new(Verdict::Ok, name, text, &[])
}

#[must_use]
pub fn warn(name: &str, text: &[&str], remedy: &[&str]) -> Line {
    Line::new(Verdict::Warn, name, text, remedy)
}

#[must_use]
pub fn fail(name: &str, text: &[&str], remedy: &[&str]) -> Line {
    Line::new(Verdict::Fail, name, text, remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_counts_and_prints() {
        let mut report = Report::default();
        report.push(ok("clock", &["it is ", "set"]));
        report.push(warn("forward", &["off"], &["turn it on"]));
        report.push(fail("disk", &["full"], &["empty it"]));
        assert_eq!((report.failed, report.warned), (1, 1));
        assert_eq!(
            report.text(),
            "ok    clock    it is set\nwarn  forward  off -> turn it on\nfail  disk     full -> empty it"
        );
        assert!(report.serialize_json().contains(r#""verdict":"fail","text":"full","remedy":"empty it""#));
    }
}
