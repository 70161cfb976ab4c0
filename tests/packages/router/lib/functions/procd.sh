# A double of procd and of its shell functions: instances with their parameters in files, real processes, and what procd
# does on a change, a signal and a death. Whatever it would not take goes to /tmp/procd/errors.

PROCD=/tmp/procd
KNOWN="command file reload_signal respawn term_timeout pidfile stdout stderr env limits netdev nice user group"

_error() { mkdir -p $PROCD; echo "$*" >>$PROCD/errors; }

procd_open_service() {
	_service=$1
	rm -rf "$PROCD/$1/new"
	mkdir -p "$PROCD/$1/new"
}

procd_open_instance() {
	_instance=$PROCD/$_service/new/${1:?an instance has a name}
	mkdir "$_instance"
}

procd_set_param() {
	local what=$1 path
	shift
	list_contains KNOWN "$what" || _error "procd_set_param $what"
	[ "$what" != reload_signal ] || set -- "$(kill -l "${1#SIG}")"
	for path; do printf '%s\n' "$path"; done >"$_instance/$what"
	[ "$what" != file ] || for path; do md5sum "$path"; done >"$_instance/sums" 2>/dev/null
}

procd_close_instance() { [ -s "$_instance/command" ] || _error "an instance without a command"; }

procd_add_reload_trigger() { echo "$*" >"$PROCD/$_service/triggers"; }

# What is not in the new set ends; what has changed is told, or begins anew.
procd_close_service() {
	local old=$PROCD/$_service/now new name
	service_triggers
	mkdir -p "$old"
	for name in $(ls "$old"); do
		[ -d "$PROCD/$_service/new/$name" ] || _end "$old/$name"
	done
	for name in $(ls "$PROCD/$_service/new"); do
		new=$PROCD/$_service/new/$name
		if [ ! -d "$old/$name" ]; then
			mv "$new" "$old/$name"
			_begin "$old/$name"
		elif ! _same "$old/$name" "$new"; then
			for file in "$new"/*; do mv "$file" "$old/$name/"; done
			if [ -s "$old/$name/reload_signal" ]; then
				kill -"$(cat "$old/$name/reload_signal")" "$(cat "$old/$name/pid")"
			else
				mv "$old/$name" "$new"
				_end "$new"
				mv "$new" "$old/$name"
				_begin "$old/$name"
			fi
		fi
	done
}

_same() {
	local file
	for file in command sums pidfile respawn; do
		cmp -s "$1/$file" "$2/$file" || [ ! -e "$1/$file" -a ! -e "$2/$file" ] || return 1
	done
}

# In the background: the process, again and again where it is to respawn.
_begin() {
	setsid sh -c '
		cd "$1"
		rm -f halted
		while :; do
			IFS="
"
			set -- $(cat command)
			"$@" >>/tmp/logread 2>&1 </dev/null &
			echo $! >pid
			[ ! -s pidfile ] || cp pid "$(cat pidfile)"
			wait $!
			echo $? >>ends
			[ ! -e halted ] && [ -s respawn ] || break
			sleep "$(sed -n 2p respawn)"
			[ ! -e halted ] || break
		done
		[ ! -s pidfile ] || rm -f "$(cat pidfile)"
	' sh "$1" >/dev/null 2>&1 &
	while [ ! -s "$1/pid" ]; do sleep 0.05; done
}

# As procd: SIGTERM, and it does not wait.
_end() {
	touch "$1/halted"
	kill "$(cat "$1/pid")" 2>/dev/null
	mv "$1" "$1.gone.$$.$(cut -d ' ' -f 1 /proc/uptime)"
	mv "$1".gone.* /tmp/procd/ 2>/dev/null
}

# procd_kill SERVICE [INSTANCE]
procd_kill() {
	local name
	for name in $(ls "$PROCD/$1/now" 2>/dev/null); do
		[ -n "$2" ] && [ "$2" != "$name" ] || _end "$PROCD/$1/now/$name"
	done
}
