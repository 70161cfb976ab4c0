# Reads a file of UCI, does `command`, writes it as `uci export` does.

function strip(text) {
	if (text ~ /^'.*'$/ || text ~ /^".*"$/) text = substr(text, 2, length(text) - 2)
	return text
}

/^[ \t]*(#|$)/ { next }
{ sub(/^[ \t]+/, "") }
$1 == "config" { type[++n] = strip($2); name[n] = strip($3); next }
$1 == "option" || $1 == "list" {
	kind = $1; key = $2
	sub(/^[^ \t]+[ \t]+[^ \t]+[ \t]+/, "")
	lines[n, ++count[n]] = kind; keys[n, count[n]] = strip(key); values[n, count[n]] = strip($0)
}

END {
	at = index(path, ".")
	wanted = at ? substr(path, 1, at - 1) : path
	key = at ? substr(path, at + 1) : ""
	for (i = 1; i <= n; i++) if (name[i] == wanted || wanted == "@" type[i] "[-1]") found = i
	if (command != "export" && command != "get" && !found) { if (command == "set" && key == "") { type[++n] = value; name[n] = wanted; found = n } else exit 1 }
	if (command == "get") {
		for (j = 1; j <= count[found]; j++) if (keys[found, j] == key) { print values[found, j]; got = 1 }
		exit !got
	}
	if (command == "set" && key != "") {
		for (j = 1; j <= count[found] && keys[found, j] != key; j++);
		if (j > count[found]) count[found] = j
		lines[found, j] = "option"; keys[found, j] = key; values[found, j] = value
	}
	if (command == "add_list") { j = ++count[found]; lines[found, j] = "list"; keys[found, j] = key; values[found, j] = value }
	for (i = 1; i <= n; i++) {
		if (command == "delete" && i == found && key == "") continue
		print "\nconfig " type[i] (name[i] == "" ? "" : " '" name[i] "'")
		for (j = 1; j <= count[i]; j++)
			if (!(command == "delete" && i == found && keys[i, j] == key)) print "\t" lines[i, j] " " keys[i, j] " '" values[i, j] "'"
	}
}
