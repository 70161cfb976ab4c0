"""The manual page and the shells' completions, from what `weft --help` and its commands' --help print.

help.py WEFT VERSION FOLDER writes weft.8, weft.bash, weft.zsh and weft.fish; WEFT is a program to run."""
import os
import re
import subprocess
import sys
import time

# What completes an argument, by its name in --help; the others are free text.
COMPLETES = {"file": "file", "directory": "directory", "path": "file", "level": "error warn info debug trace",
             "role": "relay egress admin"}


class Command:
    """What one --help says."""

    def __init__(self, weft, words):
        self.words = words
        text = subprocess.run([weft, *words, "--help"], capture_output=True, text=True, check=True).stdout
        blocks, title = {"": []}, ""
        for line in text.splitlines():
            if found := re.fullmatch(r"([A-Z][A-Za-z ]+):", line):
                title = found[1]
                blocks[title] = []
            else:
                blocks[title].append(line)
        self.usage = blocks[""][0].removeprefix("Usage: ")
        self.about = " ".join(line.strip() for line in blocks[""][1:] if line.strip())
        self.options, self.positionals = table(blocks.get("Options")), table(blocks.get("Positional Arguments"))
        self.examples = [line.strip() for line in blocks.get("Examples", []) if line.strip()]
        self.notes = [line.strip() for line in blocks.get("Notes", []) if line.strip()]
        self.options = [("--help" if name.startswith("--help") else name, what) for name, what in self.options]
        self.takes = dict(re.findall(r"(--[a-z-]+) <([^>]+?)(?:\.\.\.)?>", self.usage))
        self.commands = [(Command(weft, [*words, name]), what) for name, what in table(blocks.get("Commands"))]
        if not self.options:
            raise SystemExit(f"help.py: no options in what `weft {' '.join(words)} --help` prints")

    @property
    def name(self):
        return " ".join(["weft", *self.words])

    def every(self):
        yield self
        for command, _ in self.commands:
            yield from command.every()


def table(lines):
    """(name, text) of a block of two columns; a line without a name goes on with the one before."""
    out = []
    for line in lines or []:
        found = re.fullmatch(r"  (\S.*?)(?:  +(\S.*))?", line)
        if found:
            out.append([found[1], found[2] or ""])
        elif line.strip() and out:
            out[-1][1] += " " + line.strip()
    return [(name, text.strip()) for name, text in out]


def roff(text):
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")
    return "\\&" + text if text.startswith(".") else text


def manual(top, version):
    date = time.strftime("%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", "0"))))
    out = [f'.TH WEFT 8 "{date}" "weft {version}"', ".SH NAME", "weft \\- network of a Kubernetes edge cluster",
           ".SH SYNOPSIS"]
    leaves = [c for c in top.every() if not c.commands]
    for command in leaves:
        out += [".B " + roff(command.name), roff(command.usage.removeprefix(command.name).strip()), ".br"]
    out += [".SH DESCRIPTION", roff(top.about), ".SH COMMANDS"]
    for command in leaves:
        out += [f'.SS "{roff(command.name)}"', roff(command.about[:1].upper() + command.about[1:] + ".")]
        for name, text in command.positionals + [o for o in command.options if o[0] != "--help"]:
            takes = command.takes.get(name)
            out += [".TP", f"\\fB{roff(name)}\\fR" + (f" \\fI{roff(takes)}\\fR" if takes else ""), roff(text)]
        if command.examples:
            out += [".PP", "For example:", ".nf", ".RS", *map(roff, command.examples), ".RE", ".fi"]
    out += [".SH EXIT STATUS", *(roff(note.removeprefix("Exit codes: ")) for note in top.notes),
            ".SH FILES", ".TP", ".I /etc/weft.toml", "The configuration. The one that is installed names every key with its default.",
            ".TP", ".I /etc/weft.bundle", "The secret of this machine, from", ".BR \"weft ca issue\" .",
            ".TP", ".I /run/weft/weft.sock", "Where the agent is asked.",
            ".TP", ".I /var/lib/weft", "What it knew last, for a start without the cloud.",
            ".SH EXAMPLES", ".nf", *map(roff, top.examples), ".fi"]
    return "\n".join(out) + "\n"


def bash(top):
    cases = []
    for command in top.every():
        words = [name for name, _ in command.options] + [c.words[-1] for c, _ in command.commands]
        cases.append(f'        "{" ".join(command.words)}") words="{" ".join(words)}" ;;')
    takes = {}
    for command in top.every():
        takes |= command.takes
    argument = []
    for option, kind in sorted(takes.items()):
        what = COMPLETES.get(kind, "")
        do = {"file": 'mapfile -t COMPREPLY < <(compgen -f -- "$cur")', "directory": 'mapfile -t COMPREPLY < <(compgen -d -- "$cur")',
              "": ":"}.get(what, f'mapfile -t COMPREPLY < <(compgen -W "{what}" -- "$cur")')
        argument.append(f"        {option}) {do}; return ;;")
    groups = "|".join(sorted(c.words[-1] for c in top.every() if c.words and c.commands))
    return f"""# bash completion for weft
_weft() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD - 1]}} command="" words="" i
    COMPREPLY=()
    case $prev in
{chr(10).join(argument)}
    esac
    for ((i = 1; i < COMP_CWORD; i++)); do
        [[ ${{COMP_WORDS[i]}} != -* ]] || continue
        command+="${{command:+ }}${{COMP_WORDS[i]}}"
        case $command in
            {groups}) ;;
            *) break ;;
        esac
    done
    case $command in
{chr(10).join(cases)}
    esac
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
}}
complete -o filenames -F _weft weft
"""


def quoted(text):
    return "'" + text.replace("'", "'\\''") + "'"


def zsh(top):
    def escaped(text):
        return text.replace("[", "(").replace("]", ")").replace(":", "\\:")

    def function(command):
        lines = [f"_{'_'.join(command.name.split())}() {{"]
        specs = []
        for name, text in command.options:
            spec = f"{name}[{escaped(text)}]"
            if takes := command.takes.get(name):
                what = COMPLETES.get(takes, "")
                do = {"file": "_files", "directory": "_files -/", "": " "}.get(what, f"({what})")
                spec = ("*" if "several times" in text else "") + f"{spec}:{escaped(takes)}:{do}"
            specs.append(quoted(spec))
        if command.commands:
            names = " ".join(quoted(f"{c.words[-1]}:{what}") for c, what in command.commands)
            cases = "\n".join(f"            {c.words[-1]}) _{'_'.join(c.name.split())} ;;" for c, _ in command.commands)
            lines += ["    local context state line", "    typeset -A opt_args",
                      f"    _arguments -C {' '.join(specs)} '1: :->command' '*:: :->rest'",
                      "    case $state in",
                      f"        command) local -a known=({names}); _describe command known ;;",
                      "        rest) case $words[1] in", cases, "        esac ;;", "    esac"]
        else:
            specs += [quoted(f"::{name}:" + ("_files" if name == "file" else " ")) for name, _ in command.positionals]
            lines.append(f"    _arguments {' '.join(specs)}")
        return "\n".join([*lines, "}"])

    return "#compdef weft\n" + "\n".join(function(c) for c in top.every()) + '\n_weft "$@"\n'


def fish(top):
    out = ["# fish completion for weft", "complete -c weft -f"]
    for command in top.every():
        seen = " ; and ".join(f"__fish_seen_subcommand_from {word}" for word in command.words)
        below = " ".join(c.words[-1] for c, _ in command.commands)
        if below:
            seen = f"{seen}{' ; and ' if seen else ''}not __fish_seen_subcommand_from {below}"
        for sub, what in command.commands:
            out.append(f"complete -c weft -n {quoted(seen)} -a {sub.words[-1]} -d {quoted(what)}")
        for name, text in command.options:
            takes = command.takes.get(name)
            what = COMPLETES.get(takes, "") if takes else None
            more = "" if what is None else " -r" + {"file": " -F", "directory": " -a '(__fish_complete_directories)'",
                                                  "": ""}.get(what, f" -a {quoted(what)}")
            out.append(f"complete -c weft -n {quoted(seen)} -l {name[2:]}{more} -d {quoted(text)}")
    return "\n".join(out) + "\n"


def main(argv):
    if len(argv) != 3:
        raise SystemExit(__doc__)
    weft, version, folder = argv
    top = Command(weft, [])
    os.makedirs(folder, exist_ok=True)
    for name, text in (("weft.8", manual(top, version)), ("weft.bash", bash(top)), ("weft.zsh", zsh(top)), ("weft.fish", fish(top))):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
            f.write(text)


if __name__ == "__main__":
    main(sys.argv[1:])
