"""The manual page and the completions against what the executable itself says."""
import os
import re
import tempfile

from made import HOST, ROOT, sh, version
from report import expect

WEFT = os.path.join(ROOT, "target", "cross", f"{HOST}-unknown-linux-musl", "release", "weft")


def helps(words=()):
    """{(command, …): its --help}, of all there are."""
    text = sh(WEFT, *words, "--help")
    found = {words: text}
    below = re.search(r"^Commands:\n((?:  .*\n?)+)", text, re.M)
    for name in re.findall(r"^  (\S+)", below[1], re.M) if below else []:
        found |= helps((*words, name))
    return found


def manual(folder):
    page = sh("mandoc", "-T", "ascii", f"{folder}/weft.8")
    plain = re.sub(".\b", "", page)
    commands = helps()
    for words, text in commands.items():
        for option in re.findall(r"^  (--[a-z-]+)", text, re.M):
            expect(option in plain or option == "--help", f"weft {' '.join(words)} {option} is not in the page")
        expect(not words or words[-1] in plain, words)
    expect(len(commands) > 8, commands)
    trouble = [line for line in sh("mandoc", "-T", "lint", f"{folder}/weft.8", check=False).splitlines()
               if "ERROR" in line or "UNSUPP" in line]
    expect(not trouble, trouble)
    return f"{len(commands)} commands, {len(plain.splitlines())} lines"


def bash(folder):
    def offers(*words):
        script = f'source {folder}/weft.bash; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _weft; printf "%s\\n" "${{COMPREPLY[@]}}"'
        return set(sh("bash", "-c", script, "bash", "weft", *words).split())
    commands = helps()
    for words, text in commands.items():
        known = set(re.findall(r"^  (--[a-z-]+)", text, re.M)) | {c[-1] for c in commands if c and c[:-1] == words}
        expect(offers(*words, "") == known, f"weft {words}: {offers(*words, '')} are offered, {known} are there")
    expect(offers("ca", "is") == {"issue"} and offers("ca", "issue", "--role", "r") == {"relay"}, "a part of a word")
    return f"{len(commands)} commands"


def others(folder):
    texts = {shell: open(f"{folder}/weft.{shell}", encoding="utf-8").read() for shell in ("zsh", "fish")}
    for words, text in helps().items():
        for option in re.findall(r"^  --([a-z-]+)", text, re.M):
            expect(f"--{option}[" in texts["zsh"] and f" -l {option} " in texts["fish"], f"{words} --{option}")
    return "zsh and fish name every option"


def cases(report):
    with tempfile.TemporaryDirectory() as folder:
        sh("python3", "-B", "packaging/help.py", WEFT, version(), folder)
        report.case("manual", manual, folder)
        report.case("completion-bash", bash, folder)
        report.case("completion-others", others, folder)
