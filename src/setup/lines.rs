//! Lines that are put into files of others and taken out again, byte for byte. A file of OpenWrt's UCI has sections.

use nanoserde::{DeJson, SerJson};

/// A line that we have added.
#[derive(Clone, Debug, DeJson, PartialEq, Eq, SerJson)]
pub struct Added {
    /// Which `config dnsmasq` of the file it is in, from 1; 0: before the first, or there are none.
    pub section: usize,
    pub line: String,
}

/// Words as UCI has them: white space parts them, quotes hold them together.
fn words(line: &str) -> Vec<String> {
    let (mut out, mut word, mut quote, mut within) = (Vec::new(), String::new(), None, false);
    for c in line.chars() {
        match quote {
            Some(q) if q == c => quote = None,
            Some(_) => word.push(c),
            None if c == '\'' || c == '"' => (quote, within) = (Some(c), true),
            None if c == '#' && !within => break,
            None if c.is_ascii_whitespace() => {
                if std::mem::take(&mut within) {
                    out.push(std::mem::take(&mut word));
                }
            }
            None => {
                word.push(c);
                within = true;
            }
        }
    }
    if within {
        out.push(word);
    }
    out
}

fn begins(line: &str) -> bool {
    let words = words(line);
    words.first().is_some_and(|w| w == "config") && words.get(1).is_some_and(|w| w == "dnsmasq")
}

/// Puts the items that are missing into each `config dnsmasq` of a UCI file, right behind its head: pairs of the list's
/// name and the value. None: it has no such section.
#[must_use]
pub fn add_to_uci(text: &str, wanted: &[(&str, String)]) -> Option<(String, Vec<Added>)> {
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    let heads: Vec<usize> = (0..lines.len()).filter(|i| begins(lines[*i])).collect();
    let (mut out, mut added) = (String::with_capacity(text.len() + 512), Vec::new());
    for (at, line) in lines.iter().enumerate() {
        out.push_str(line);
        let Some(section) = heads.iter().position(|head| *head == at).map(|i| i + 1) else { continue };
        let ended = line.ends_with('\n');
        let body = lines[at + 1..].iter().map(|l| words(l)).take_while(|w| w.first().is_none_or(|w| w != "config"));
        let there: Vec<_> = body.filter(|w| w.len() == 3 && w[0] == "list").collect();
        for (list, value) in wanted.iter().filter(|(l, v)| !there.iter().any(|w| w[1] == *l && w[2] == *v)) {
            let line = ["\tlist ", list, " '", value, "'"].concat();
            out.push_str(if ended { "" } else { "\n" });
            out.push_str(&line);
            out.push_str(if ended { "\n" } else { "" });
            added.push(Added { section, line });
        }
    }
    (!heads.is_empty()).then_some((out, added))
}

/// Puts a line at the end, unless it is there.
#[must_use]
pub fn append(text: &str, line: &str) -> (String, Vec<Added>) {
    if text.lines().any(|l| l.trim() == line) {
        return (text.into(), Vec::new());
    }
    let added = vec![Added { section: text.lines().filter(|l| begins(l)).count(), line: line.into() }];
    let parts = if text.is_empty() || text.ends_with('\n') { [text, line, "\n"] } else { [text, "\n", line] };
    (parts.concat(), added)
}

/// Takes out what was added, as far as it is still there; written otherwise, as UCI itself does, is there too.
#[must_use]
pub fn remove(text: &str, added: &[Added]) -> String {
    let mut left: Vec<(usize, Vec<String>)> = added.iter().map(|a| (a.section, words(&a.line))).collect();
    let (mut out, mut section) = (String::with_capacity(text.len()), 0);
    for line in text.split_inclusive('\n') {
        section += usize::from(begins(line));
        let words = words(line);
        match left.iter().position(|(of, line)| *of == section && *line == words) {
            Some(found) => {
                left.remove(found);
                // The last line had no end before us, and what was put behind it has none.
                if !line.ends_with('\n') && out.ends_with('\n') {
                    out.pop();
                }
            }
            None => out.push_str(line),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const DHCP: &str = "\nconfig dnsmasq\n\toption domainneeded '1'\n\tlist server \"/corp/10.1.1.1\"\n\n\
                        config dhcp 'lan'\n\toption interface 'lan'\n\tlist server 'x'\n\nconfig dnsmasq guest\n\toption port 5353\n";

    fn wanted() -> [(&'static str, String); 2] {
        [("server", "/cluster.local/169.254.96.16".into()), ("notinterface", "weft0".into())]
    }

    #[test]
    fn what_is_added_can_be_taken_out_again() {
        for text in [DHCP, "config dnsmasq", "config 'dnsmasq'\n\toption x y", "# c\nconfig dnsmasq\n"] {
            let (with, added) = add_to_uci(text, &wanted()).unwrap();
            assert_eq!(added.len(), 2 * text.lines().filter(|l| begins(l)).count(), "{text:?}");
            assert_eq!(remove(&with, &added), text, "{with:?}");
            let again = add_to_uci(&with, &wanted()).unwrap();
            assert_eq!(again, (with, vec![]), "twice is once");
        }
        assert_eq!(add_to_uci("config dhcp lan\n", &wanted()), None);
        for text in ["", "a", "a\n", "a\n\nb\n"] {
            let (with, added) = append(text, "conf-file=/x");
            assert_eq!(remove(&with, &added), text);
            assert_eq!(append(&with, "conf-file=/x"), (with, vec![]));
        }
    }

    #[test]
    fn a_line_that_was_there_stays() {
        let theirs = "config dnsmasq\n\tlist notinterface weft0\nconfig dnsmasq\n";
        let (with, added) = add_to_uci(theirs, &wanted()).unwrap();
        assert_eq!(added.iter().filter(|a| a.line.contains("weft0")).count(), 1);
        assert_eq!(remove(&with, &added), theirs);
    }

    #[test]
    fn lines_that_uci_wrote_anew_are_found_and_edits_of_others_stay() {
        let (with, added) = add_to_uci("# mine\nconfig dnsmasq\n", &wanted()).unwrap();
        let committed = with.replace("# mine\n", "\n").replace('\'', "\"").replace('\t', "  ") + "\toption x '1'\n";
        assert_eq!(remove(&committed, &added), "\nconfig dnsmasq\n\toption x '1'\n");
        assert_eq!(remove("config dnsmasq\n", &added), "config dnsmasq\n");
        assert_eq!(words("list  'a b'\t\"c\" '' d#e # f"), ["list", "a b", "c", "", "d#e"]);
    }
}
