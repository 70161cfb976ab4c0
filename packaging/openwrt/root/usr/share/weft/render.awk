# weft.toml from `uci export weft`: each section is the table of its type, each option a key of it. The file `keys` says
# what a key takes; one that it does not name goes through as a string, and weft says what it thinks of it.

BEGIN {
	while ((getline line < keys) > 0) {
		split(line, word, " ")
		kind[word[1] "." word[2]] = word[3]
		tables[word[1]] = 1
	}
}

function bad(text) {
	printf "/etc/config/weft: %s\n", text > "/dev/stderr"
	failed = 1
	exit 1
}

function quoted(text) {
	gsub(/\\/, "\\\\", text)
	gsub(/"/, "\\\"", text)
	gsub(/\t/, "\\t", text)
	return "\"" text "\""
}

# One value of a key, of the kind that it is.
function value(what, place, text) {
	if (what == "bool") {
		if (text ~ /^(1|on|true|yes|enabled)$/) return "true"
		if (text ~ /^(0|off|false|no|disabled)$/) return "false"
		bad(place ": \"" text "\" is neither 1 nor 0")
	}
	if (what == "number") {
		if (text ~ /^(0x[0-9a-fA-F]+|[0-9]+)$/) return text
		bad(place ": \"" text "\" is no number")
	}
	return quoted(text)
}

# [NAME=]PORT[:TARGET][/PROTOCOL]
function port(text,   whole, name, protocol, part, n) {
	whole = text
	if (match(text, /^[^=]*=/)) { name = substr(text, 1, RLENGTH - 1); text = substr(text, RLENGTH + 1) }
	if (match(text, /\/.*$/)) { protocol = substr(text, RSTART + 1); text = substr(text, 1, RSTART - 1) }
	n = split(text, part, ":")
	if (n < 1 || n > 2 || text !~ /^[0-9]+(:[0-9]+)?$/)
		bad("service.port: \"" whole "\" is not [NAME=]PORT[:TARGET][/PROTOCOL]")
	return "{ port = " part[1] (n == 2 ? ", target = " part[2] : "") \
		(name == "" ? "" : ", name = " quoted(name)) (protocol == "" ? "" : ", protocol = " quoted(protocol)) " }"
}

# ADDRESS[:PORT][@NODE]
function endpoint(text,   whole, node, address, number) {
	whole = text
	if (match(text, /@.*$/)) { node = substr(text, RSTART + 1); text = substr(text, 1, RSTART - 1) }
	address = text
	if (text ~ /^[0-9.]+:[0-9]+$/ || text ~ /^\[.*\]:[0-9]+$/) {
		match(text, /:[0-9]+$/)
		number = substr(text, RSTART + 1)
		address = substr(text, 1, RSTART - 1)
	}
	gsub(/[][]/, "", address)
	if (address == "" || address ~ /[^0-9a-fA-F.:]/) bad("service.endpoint: \"" whole "\" is not ADDRESS[:PORT][@NODE]")
	return "{ address = " quoted(address) (number == "" ? "" : ", port = " number) (node == "" ? "" : ", node = " quoted(node)) " }"
}

function close_section(   key, line) {
	if (table == "") return
	print (table == "service" ? "[[service]]" : "[" table "]")
	for (key = 1; key <= count; key++) {
		line = names[key]
		print line " = " (is_list[line] ? "[" values[line] "]" : values[line])
	}
	print ""
	table = ""
}

function put(key, text, list) {
	if (!(key in values)) { names[++count] = key; values[key] = text }
	else if (list) values[key] = values[key] ", " text
	else bad(table "." key " stands there twice")
	is_list[key] = list
}

# stub: DOMAIN=SERVER,SERVER; egress: NODES=NODE
function mapped(place, text,   i, n, part, out) {
	if (kind[place] == "pairs") {
		if (!match(text, /^[^=]+=./)) bad(place ": \"" text "\" is not NODES=NODE")
		i = index(text, "=")
		return quoted(substr(text, 1, i - 1)) " = " quoted(substr(text, i + 1))
	}
	if (!match(text, /^[^=]+=./)) bad(place ": \"" text "\" is not DOMAIN=SERVER,SERVER")
	i = index(text, "=")
	n = split(substr(text, i + 1), part, ",")
	out = quoted(substr(text, 1, i - 1)) " = ["
	for (i = 1; i <= n; i++) out = out (i > 1 ? ", " : "") quoted(part[i])
	return out "]"
}

{
	sub(/^[ \t]+/, "")
	word1 = $1
	sub(/^[^ \t]+[ \t]*/, "")
	rest = $0
}

word1 == "config" {
	close_section()
	split("", values); split("", names); split("", is_list); count = 0
	split(rest, word, " ")
	table = word[1]
	gsub(/'/, "", table)
	if (table == "weft") { table = ""; next }
	if (table != "service" && !(table in tables)) bad("there is no section of the type \"" table "\"")
	if (table != "service" && seen[table]++) bad("there are two sections of the type \"" table "\"")
	next
}

(word1 == "option" || word1 == "list") && table != "" {
	key = rest
	sub(/[ \t].*$/, "", key)
	sub(/^[^ \t]+[ \t]+/, "", rest)
	gsub(/'\\''/, "\001", rest)
	gsub(/^'|'$/, "", rest)
	gsub(/\001/, "'", rest)
	place = table "." key
	what = kind[place]
	if (table == "service" && key == "port") put("ports", port(rest), 1)
	else if (table == "service" && key == "endpoint") put("endpoints", endpoint(rest), 1)
	else if (what == "map" || what == "pairs") { if (key in values) values[key] = substr(values[key], 1, length(values[key]) - 2) ", " mapped(place, rest) " }"; else put(key, "{ " mapped(place, rest) " }", 0) }
	else if (what == "list" || (what == "" && word1 == "list")) put(key, quoted(rest), 1)
	else put(key, value(what, place, rest), 0)
}

END { if (!failed) close_section() }
