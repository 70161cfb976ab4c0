//! Follows one resource of an API server or metaServer: list, watch, and what to do when either fails. Without IO: bytes
//! and time come in; requests, hang-ups and timers come out; what the bytes say goes straight into the table.

mod answer;
mod lost;

use super::{
    resource::{self, Ask, Options, Resource},
    store::{Ended, Store},
};
use crate::{
    backoff::Backoff,
    table::{
        Table,
        model::{Name, Source},
    },
};
pub(super) use answer::value_end;
use answer::{Answer, Page, Said};
use lost::Lost;
use std::time::{Duration, Instant};

/// client-go's reflector: 0.8 s doubling to 30 s, forgotten after 2 minutes without an error.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(800), Duration::from_secs(30));
const FORGET: Duration = Duration::from_secs(120);

/// After answers that only an administrator can change, such as 403.
const SLOW: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(300));

/// A whole fleet loses the same server at the same time: its first tries are spread over this.
pub const SPREAD: Duration = Duration::from_secs(6);

/// A watch that ended sooner, and told nothing, has failed.
const SHORT: Duration = Duration::from_secs(1);

/// Without a byte for so long, a list has failed. metaServer asks the cloud for 10 s before it answers itself.
const LIST_SILENCE: Duration = Duration::from_secs(30);

/// A server that has sent no bookmark so long after the last object will never send one (metaServer, old proxies).
const BURST_SILENCE: Duration = Duration::from_secs(10);

/// Beyond the time at which the server should have ended a watch.
const WATCH_SLACK: Duration = Duration::from_secs(30);

/// A server that ends a watch so long before its time is about to end itself. One that was restored from a backup
/// meanwhile answers a watch from a version of its lost future with silence.
const EARLY: Duration = Duration::from_secs(5);

/// Bookmarks come each minute; three of them are missing.
const BOOKMARKS_MISSED: Duration = Duration::from_secs(200);

/// How long the server lets a watch live, in seconds: drawn, so that a fleet does not come back at once. client-go: 300
/// to 600. Always the same for metaServer, to which another number is another request.
const WATCH_SECONDS: std::ops::Range<u32> = 300..600;
const METASERVER_SECONDS: u32 = 600;

/// metaServer loses events: a list each so often, drawn, as often as it takes to tell the cloud from its own store.
const RELIST_SECONDS: std::ops::Range<u64> = 300..600;
const CONFIRM: Duration = Duration::from_secs(15);
const CONFIRM_TRIES: u8 = 2;

/// A 500 in the stream is retried with the same version for so long (client-go), then all is listed.
const INTERNAL_ERRORS: Duration = Duration::from_secs(60);

/// Answers in a row with Retry-After that are obeyed (client-go), and the longest.
const RETRY_AFTER_TRIES: u8 = 10;
const RETRY_AFTER_MAX: u32 = 300;

/// A connection is not kept over a longer rest.
const KEEP_OVER: Duration = Duration::from_secs(10);

/// WatchLists that are cut before their end, until it is listed instead: by a proxy that does not know them.
const WATCH_LIST_TRIES: u8 = 2;

/// Lines in the log for each time that it does not work.
const SAID_MAX: u8 = 3;

/// What happens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input<'b> {
    Connected,
    /// There is no connection to be had, or no longer, and why, in words that name the remedy.
    Refused(String),
    Bytes(&'b [u8]),
    /// By the server, or broken.
    Closed,
    /// Links or the clock have changed: what failed may be tried again.
    Nudge,
    Tick,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    Connect,
    /// Path and query to be asked for on the connection.
    Get(String),
    Hangup,
    Wait(Instant),
}

/// When a client that has just been started first asks: a power cut starts a whole fleet at once.
#[must_use]
pub fn first_try(now: Instant, spread: Duration, rng: &mut fastrand::Rng) -> Instant {
    now + spread.mul_f64(rng.f64())
}

/// What is to be followed.
#[derive(Clone, Debug)]
pub struct Setup {
    pub resource: Resource,
    /// None: in all.
    pub namespace: Option<Name>,
    pub metaserver: bool,
    pub pod_names: bool,
    /// Not before.
    pub start: Instant,
    /// First tries after an outage are spread over this.
    pub spread: Duration,
    pub rng: fastrand::Rng,
}

/// How it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    pub resource: Resource,
    pub namespace: Option<Name>,
    /// Whether all is in the table that the server has, as far as we know.
    pub synced: bool,
    /// Since when it is so.
    pub since: Instant,
    pub objects: usize,
    pub error: Option<String>,
}

enum Phase {
    Rest(Instant),
    /// Ask at once.
    Begin,
    Connecting,
    Asked(Box<Answer>),
}

/// See the module. After each input [`Watcher::poll_output`] is to be called until it says [`Output::Wait`].
pub struct Watcher {
    store: Store,
    namespace: Option<Name>,
    options: Options,
    spread: Duration,
    rng: fastrand::Rng,
    now: Instant,
    phase: Phase,
    connected: bool,
    hangup: bool,
    ask: Ask,
    /// From which the next watch begins; empty: a list is needed.
    version: String,
    watch_list: bool,
    cuts: u8,
    /// The server may have gone back in time: compare before the next watch.
    suspicious: bool,
    backoff: Backoff,
    slow: Backoff,
    /// The last failure that counts, and how many since it was well.
    failed: Option<Instant>,
    failures: u32,
    retries: u8,
    pages: u32,
    gone: u8,
    /// Versions of the API that the server does not have, in a row.
    absent: u8,
    internal_since: Option<Instant>,
    refused_token: u8,
    relist: Option<Instant>,
    doubts: u8,
    listed: bool,
    synced: bool,
    since: Instant,
    error: Option<String>,
    said: u8,
}

impl Watcher {
    #[must_use]
    pub fn new(setup: Setup) -> Self {
        let Setup { resource, namespace, metaserver, pod_names, start, spread, mut rng } = setup;
        let timeout = if metaserver { METASERVER_SECONDS } else { rng.u32(WATCH_SECONDS) };
        let ask =
            if metaserver { Ask::List { next: String::new(), cached: false } } else { Ask::WatchList { cached: true } };
        Self {
            store: Store::new(resource, namespace.clone(), metaserver, pod_names),
            namespace,
            options: Options { limit: !metaserver, bookmarks: !metaserver, timeout, metaserver },
            spread: if metaserver { Duration::ZERO } else { spread },
            rng,
            now: start,
            phase: Phase::Rest(start),
            connected: false,
            hangup: false,
            ask,
            version: String::new(),
            watch_list: !metaserver,
            cuts: 0,
            suspicious: false,
            backoff: Backoff::new(BACKOFF.0, BACKOFF.1),
            slow: Backoff::new(SLOW.0, SLOW.1),
            failed: None,
            failures: 0,
            retries: 0,
            pages: 0,
            gone: 0,
            absent: 0,
            internal_since: None,
            refused_token: 0,
            relist: None,
            doubts: 0,
            listed: false,
            synced: false,
            since: start,
            error: None,
            said: 0,
        }
    }

    /// Whether a list has come to its end since the start.
    #[must_use]
    pub fn listed(&self) -> bool {
        self.listed
    }

    /// Whether the token was refused: then it is to be read anew.
    #[must_use]
    pub fn token_refused(&self) -> bool {
        self.refused_token > 0
    }

    #[must_use]
    pub fn report(&self) -> Report {
        Report {
            resource: self.store.resource,
            namespace: self.namespace.clone(),
            synced: self.synced,
            since: self.since,
            objects: self.store.objects,
            error: self.error.clone(),
        }
    }

    /// Whether it waits for more bytes.
    #[must_use]
    pub fn is_reading(&self) -> bool {
        !self.hangup && matches!(self.phase, Phase::Asked(_))
    }

    #[must_use]
    pub fn poll_output(&mut self) -> Output {
        if std::mem::take(&mut self.hangup) && std::mem::take(&mut self.connected) {
            return Output::Hangup;
        }
        match &self.phase {
            Phase::Rest(until) => Output::Wait(*until),
            // The driver has its own limit for that.
            Phase::Connecting => Output::Wait(self.now + LIST_SILENCE),
            Phase::Asked(answer) => Output::Wait(self.deadline(answer).0),
            Phase::Begin if !self.connected => {
                self.phase = Phase::Connecting;
                Output::Connect
            }
            Phase::Begin => {
                if self.ask == Ask::Watch && self.suspicious && !self.options.metaserver {
                    self.ask = Ask::Probe;
                }
                match &self.ask {
                    Ask::WatchList { .. } => self.store.begin(),
                    Ask::List { next, .. } if next.is_empty() => {
                        self.store.begin();
                        self.pages = 0;
                    }
                    Ask::List { .. } | Ask::Probe | Ask::Watch => {}
                }
                let (resource, namespace) = (self.store.resource, self.namespace.as_deref());
                let target = resource::target(resource, namespace, &self.ask, self.options, &self.version);
                self.phase = Phase::Asked(Box::new(Answer::new(self.ask.clone(), self.now)));
                Output::Get(target)
            }
        }
    }

    /// Every input advances time first.
    pub fn handle_input(&mut self, now: Instant, input: Input<'_>, table: &mut Table) {
        self.now = self.now.max(now);
        match input {
            Input::Tick => {}
            Input::Connected => {
                self.connected = true;
                if let Phase::Connecting = self.phase {
                    self.phase = Phase::Begin;
                }
            }
            Input::Refused(why) => match std::mem::replace(&mut self.phase, Phase::Begin) {
                Phase::Connecting => self.lost(Lost::Unreachable(why), None),
                Phase::Asked(answer) => {
                    self.connected = false;
                    self.lost(Lost::Unreachable(why), Some(*answer));
                }
                other @ (Phase::Rest(_) | Phase::Begin) => self.phase = other,
            },
            Input::Bytes(bytes) => self.bytes(bytes, table),
            Input::Closed => self.closed(table),
            Input::Nudge => {
                if let Phase::Rest(until) = &mut self.phase
                    && self.error.is_some()
                {
                    *until = (*until).min(self.now + SHORT.mul_f64(self.rng.f64()));
                }
            }
        }
        self.timers();
    }

    fn timers(&mut self) {
        match std::mem::replace(&mut self.phase, Phase::Begin) {
            Phase::Rest(until) if until <= self.now => {}
            Phase::Asked(answer) => {
                let (at, why) = self.deadline(&answer);
                if at > self.now {
                    self.phase = Phase::Asked(answer);
                } else if let Some(why) = why {
                    self.hangup = true;
                    self.lost(why, Some(*answer));
                } else {
                    self.hangup = true;
                    self.ask_for_all();
                }
            }
            other @ (Phase::Rest(_) | Phase::Begin | Phase::Connecting) => self.phase = other,
        }
    }

    /// When an answer under way is given up, and for what; None: it is time for a list.
    fn deadline(&self, answer: &Answer) -> (Instant, Option<Lost>) {
        let whole = Duration::from_secs(self.options.timeout.into()) + WATCH_SLACK;
        match answer.ask {
            Ask::List { .. } | Ask::Probe => (answer.heard + LIST_SILENCE, Some(Lost::Silent)),
            Ask::WatchList { .. } if !answer.complete => {
                let limit = if answer.opened.is_some() { BURST_SILENCE } else { LIST_SILENCE };
                (answer.heard + limit, Some(Lost::NoBookmark))
            }
            Ask::WatchList { .. } | Ask::Watch => {
                let mut first = (answer.began + whole, Some(Lost::Silent));
                if answer.bookmarks > 0 && answer.heard + BOOKMARKS_MISSED < first.0 {
                    first = (answer.heard + BOOKMARKS_MISSED, Some(Lost::Suspicious));
                }
                if let Some(relist) = self.relist.filter(|at| *at < first.0) {
                    first = (relist, None);
                }
                first
            }
        }
    }

    fn bytes(&mut self, bytes: &[u8], table: &mut Table) {
        let Phase::Asked(mut answer) = std::mem::replace(&mut self.phase, Phase::Begin) else {
            // Nothing was asked.
            self.hangup = true;
            self.phase = Phase::Rest(self.now + SHORT);
            return;
        };
        answer.heard = self.now;
        let mut rest = bytes;
        loop {
            match answer.next(&mut rest, &mut self.store, table) {
                Ok(None) => return self.phase = Phase::Asked(answer),
                Ok(Some(Said::Opened)) => self.opened(&answer),
                Ok(Some(Said::Event(version))) => self.moved(&answer, version),
                Ok(Some(Said::AllSent(version))) => {
                    answer.complete = true;
                    self.moved(&answer, version);
                    self.complete(table);
                }
                Ok(Some(Said::Trouble(what))) => log::warn!("{}: {what}", self.what()),
                Ok(Some(Said::End)) => {
                    self.hangup |= answer.closes() || !rest.is_empty();
                    return self.ended(*answer, table);
                }
                Err(why) => {
                    // After a refusal that was read to its end the connection is as good as new.
                    self.hangup |= !matches!(why, Lost::Status { .. }) || answer.closes() || !rest.is_empty();
                    return self.lost(why, Some(*answer));
                }
            }
        }
    }

    fn closed(&mut self, table: &mut Table) {
        if !std::mem::take(&mut self.connected) {
            return;
        }
        self.hangup = false;
        match std::mem::replace(&mut self.phase, Phase::Begin) {
            Phase::Asked(mut answer) => match answer.closed() {
                Ok(()) => self.ended(*answer, table),
                Err(why) => self.lost(why, Some(*answer)),
            },
            // While nothing was asked the server may close as it likes.
            other @ (Phase::Rest(_) | Phase::Begin | Phase::Connecting) => self.phase = other,
        }
    }

    /// A watch was granted.
    fn opened(&mut self, answer: &Answer) {
        if answer.ask == Ask::Watch {
            self.well();
        }
    }

    /// The version goes with each event, but not before all has been sent for once.
    fn moved(&mut self, answer: &Answer, version: String) {
        (self.gone, self.internal_since) = (0, None);
        if (answer.complete || answer.ask == Ask::Watch) && !version.is_empty() {
            self.version = version;
        }
    }

    /// An answer has come to its end, as it should.
    fn ended(&mut self, mut answer: Answer, table: &mut Table) {
        match (&answer.ask, answer.page.take()) {
            (Ask::List { .. }, Some(page)) => self.page(page, table),
            (Ask::Probe, Some(page)) => {
                self.suspicious = false;
                if super::store::number(&page.version) < super::store::number(&self.version) {
                    log::warn!("{}: the server has gone back in time: all is listed anew", self.what());
                    self.ask_for_all();
                } else {
                    self.go_on(Ask::Watch);
                }
            }
            // The list's body was no list; `answer` says so itself.
            (Ask::List { .. } | Ask::Probe, None) => self.lost(Lost::NotAList, None),
            (Ask::WatchList { .. }, _) if !answer.complete => self.lost(Lost::NoBookmark, None),
            (Ask::WatchList { .. } | Ask::Watch, _) => {
                if answer.lived(self.now) < SHORT && answer.events == 0 {
                    return self.lost(Lost::Short, Some(answer));
                }
                if self.store.resource == Resource::Endpoints {
                    // Perhaps there are EndpointSlices by now.
                    self.store.resource = Resource::Slices;
                    return self.ask_for_all();
                }
                let due = Duration::from_secs(self.options.timeout.into()).saturating_sub(EARLY);
                self.suspicious |= answer.lived(self.now) < due;
                self.go_on(Ask::Watch);
            }
        }
    }

    fn page(&mut self, page: Page, table: &mut Table) {
        self.retries = 0;
        if page.version.is_empty() {
            return self.lost(Lost::Unknown, None);
        }
        self.version = page.version;
        if page.next.is_empty() {
            return self.complete_list(table);
        }
        self.pages += 1;
        if self.pages > super::loading::PAGES_MAX {
            return self.lost(Lost::NotAList, None);
        }
        self.go_on(Ask::List { next: page.next, cached: false });
    }

    fn complete_list(&mut self, table: &mut Table) {
        self.complete(table);
        self.go_on(Ask::Watch);
    }

    /// All that the server has is in the table.
    fn complete(&mut self, table: &mut Table) {
        let (ended, trouble) = self.store.end(&self.version, table);
        if let Some(trouble) = trouble {
            log::warn!("{}: {trouble}", self.what());
        }
        if self.options.metaserver {
            let doubt = ended == Ended::Doubtful && self.doubts < CONFIRM_TRIES;
            self.doubts = if doubt { self.doubts + 1 } else { 0 };
            let usual = Duration::from_secs(self.rng.u64(RELIST_SECONDS));
            self.relist = Some(self.now + if doubt { CONFIRM } else { usual });
        }
        (self.suspicious, self.cuts) = (false, 0);
        if !std::mem::replace(&mut self.listed, true) {
            log::info!("{}: {} objects", self.what(), table.count(Source::Api, &self.store.scope()));
        }
        self.well();
    }

    /// Ask for all there is, by the best means that this server has.
    fn ask_for_all(&mut self) {
        self.version.clear();
        self.store.abort();
        self.go_on(if self.watch_list {
            Ask::WatchList { cached: !self.listed }
        } else {
            Ask::List { next: String::new(), cached: !self.listed && !self.options.metaserver }
        });
    }

    fn go_on(&mut self, ask: Ask) {
        if ask == Ask::Watch && !self.options.metaserver {
            self.options.timeout = self.rng.u32(WATCH_SECONDS);
        }
        self.ask = ask;
        self.phase = Phase::Begin;
    }

    fn rest(&mut self, time: Duration) {
        self.hangup |= time > KEEP_OVER;
        self.phase = Phase::Rest(self.now + time);
    }

    /// It works (again).
    fn well(&mut self) {
        (self.retries, self.refused_token, self.absent) = (0, 0, 0);
        self.slow.reset();
        if self.listed && !std::mem::replace(&mut self.synced, true) {
            self.since = self.now;
        }
        if self.error.take().is_some() && self.said > 0 {
            log::info!("{} can be followed again", self.what());
        }
        self.said = 0;
    }

    /// For the log.
    fn what(&self) -> String {
        let name = self.store.resource.name();
        self.namespace.as_ref().map_or_else(|| name.into(), |namespace| format!("{name} of {namespace}"))
    }
}
