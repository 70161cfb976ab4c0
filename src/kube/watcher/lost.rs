//! What can go wrong, what it is called, and what follows from it.

use super::{
    Answer, Ask, BACKOFF, FORGET, INTERNAL_ERRORS, RETRY_AFTER_MAX, RETRY_AFTER_TRIES, Resource, SAID_MAX, SHORT,
    WATCH_LIST_TRIES, Watcher,
};
use crate::kube::{http::HttpError, json::JsonError};
use std::{fmt, time::Duration};

/// Characters of a server's own words that are shown.
const MESSAGE_MAX: usize = 300;

/// A resource that is not there is asked for again after 1 to 5 minutes.
const ABSENT_SECONDS: std::ops::Range<u64> = 60..300;

/// Versions of an API that are asked for before there is none.
const VERSIONS: u8 = 3;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Lost {
    /// No connection, and why.
    Unreachable(String),
    /// Closed in the middle.
    Cut,
    Silent,
    /// No bookmark, where three were due.
    Suspicious,
    /// A WatchList that never said that all was sent.
    NoBookmark,
    /// A watch that ended at once.
    Short,
    NotHttp(HttpError),
    NotJson(String),
    NotKube(String),
    NotAList,
    /// An empty list without a version: how metaServer says that it does not know.
    Unknown,
    Status {
        code: u16,
        retry_after: Option<u32>,
        message: String,
        location: String,
    },
    /// An ERROR in a watch.
    Event {
        code: u16,
        message: String,
    },
}

impl From<HttpError> for Lost {
    fn from(error: HttpError) -> Self {
        Self::NotHttp(error)
    }
}

impl From<JsonError> for Lost {
    fn from(error: JsonError) -> Self {
        Self::NotKube(error.to_string())
    }
}

struct Shown<'s>(&'s str);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().take(MESSAGE_MAX).try_for_each(|c| write!(f, "{}", if c.is_control() { ' ' } else { c }))
    }
}

impl Watcher {
    /// In words that name the remedy.
    fn words(&self, lost: &Lost) -> String {
        let server = if self.options.metaserver { "metaServer" } else { "the API server" };
        let resource = self.store.resource.name();
        match lost {
            Lost::Unreachable(why) => why.clone(),
            Lost::Cut => format!("{server} has closed the connection in the middle of an answer"),
            Lost::Silent | Lost::Suspicious => format!("{server} is silent: asked again on a new connection"),
            Lost::NoBookmark => format!("{server} does not say when all has been sent: listed instead"),
            Lost::Short => format!("{server} ends every watch at once"),
            Lost::NotHttp(error) => format!("{error}: is there a proxy on the way, or another server at this port?"),
            Lost::NotJson(kind) => {
                format!("answered with {}, not JSON: is there a captive portal on the way?", Shown(kind))
            }
            Lost::NotKube(what) => format!("{server} has sent {}", Shown(what)),
            Lost::NotAList => format!("{server} has sent something else than a list of {resource}"),
            Lost::Unknown => {
                "an empty list without a version: metaServer has nothing of its own and cannot ask the cloud; \
                              is the link down, or dynamicController of cloudcore off?"
                    .into()
            }
            Lost::Status { code: 401, .. } => {
                "401: the token or certificate is not accepted; is it of this cluster, and not expired?".into()
            }
            Lost::Status { code: 403, message, .. } => format!(
                "403: it may not list and watch {resource}: bind the ClusterRole of packaging/kubernetes/rbac.yaml ({})",
                Shown(message)
            ),
            Lost::Status { code: 404, .. } => format!("404: the server has no {resource}"),
            Lost::Status { code: code @ 300..=399, location, .. } => {
                format!("{code}: it wants to send us to {}, which is not followed: set kube.api to it", Shown(location))
            }
            Lost::Status { code, message, .. } | Lost::Event { code, message } => format!("{code}: {}", Shown(message)),
        }
    }

    /// Something went wrong: decides what comes next, and when.
    pub(super) fn lost(&mut self, lost: Lost, answer: Option<Answer>) {
        let words = self.words(&lost);
        let lived = answer.as_ref().map_or(Duration::ZERO, |a| a.lived(self.now));
        let told = answer.as_ref().is_some_and(|a| a.events > 0);
        let watching = self.ask == Ask::Watch || answer.is_some_and(|a| a.complete);
        if !matches!(lost, Lost::Status { .. }) {
            self.hangup = true;
        }
        if watching {
            self.ask = Ask::Watch;
        }
        // A list or WatchList that did not come to its end begins anew; a page that can be asked for again does not.
        let again = matches!(lost, Lost::Status { retry_after: Some(_), .. }) && self.retries < RETRY_AFTER_TRIES;
        if !watching && !again {
            self.store.abort();
            if let Ask::List { next, .. } = &mut self.ask {
                next.clear();
            }
        }
        match lost {
            Lost::Status { code: 410, .. } | Lost::Event { code: 410, .. } => self.lost_gone(words),
            Lost::Cut | Lost::Silent | Lost::Suspicious if watching => {
                self.suspicious = true;
                if lived < SHORT && !told {
                    return self.fail(words);
                }
                log::debug!("{}: {words}", self.what());
                self.desync();
                self.error = Some(words);
                let wait = self.spread();
                self.rest(wait);
            }
            // The end of a watch, in metaServer's own words.
            Lost::Event { code: 500, .. } if self.options.metaserver && lived >= SHORT => self.go_on(Ask::Watch),
            Lost::Event { .. } | Lost::NotKube(_) if watching => {
                let since = *self.internal_since.get_or_insert(self.now);
                if self.now.saturating_duration_since(since) >= INTERNAL_ERRORS {
                    self.internal_since = None;
                    self.ask_for_all();
                }
                self.fail(words);
            }
            Lost::NoBookmark | Lost::Event { .. } if matches!(self.ask, Ask::WatchList { .. }) => {
                log::info!("{}: {words}", self.what());
                self.watch_list = false;
                self.ask_for_all();
            }
            Lost::Status { code: 400 | 422, .. } if self.drop_an_option() => {
                log::info!("{}: {words}; asked in a simpler way", self.what());
            }
            Lost::Status { code: 401, .. } if self.refused_token == 0 => {
                self.refused_token = 1;
                self.rest(SHORT);
            }
            Lost::Status { code: 404, .. } if self.store.resource == Resource::Slices => {
                log::info!("{}: {words}; Endpoints instead", self.what());
                self.store.resource = Resource::Endpoints;
                self.ask_for_all();
            }
            Lost::Status { code: 404, .. } if self.store.resource.next_version().is_some() => self.lost_version(),
            Lost::Status { code: 404, .. } => {
                let wait = Duration::from_secs(self.rng.u64(ABSENT_SECONDS));
                if self.store.resource == Resource::Endpoints {
                    self.store.resource = Resource::Slices;
                }
                self.ask_for_all();
                self.tell(words);
                self.rest(wait);
            }
            Lost::Status { code: 401 | 403 | 406 | 300..=399, .. } => {
                let wait = self.slow.delay(&mut self.rng);
                self.tell(words);
                self.rest(wait);
            }
            Lost::Status { code: 429 | 500..=599, retry_after: Some(seconds), .. }
                if self.retries < RETRY_AFTER_TRIES =>
            {
                self.retries += 1;
                if let Ask::List { cached, .. } | Ask::WatchList { cached } = &mut self.ask {
                    // 504: the server's cache is behind the version.
                    *cached = false;
                }
                let seconds = Duration::from_secs(seconds.min(RETRY_AFTER_MAX).into());
                let jitter = (seconds / 4).max(SHORT).mul_f64(self.rng.f64());
                self.tell(words);
                self.rest(seconds + jitter);
            }
            Lost::Unreachable(_) => {
                self.suspicious = true;
                self.fail(words);
            }
            Lost::Cut | Lost::Silent | Lost::NotHttp(_) if matches!(self.ask, Ask::WatchList { .. }) => {
                self.cuts += 1;
                if self.cuts >= WATCH_LIST_TRIES {
                    self.watch_list = false;
                    self.ask_for_all();
                }
                self.fail(words);
            }
            Lost::Status { .. }
            | Lost::Event { .. }
            | Lost::Cut
            | Lost::Silent
            | Lost::Suspicious
            | Lost::NoBookmark
            | Lost::Short
            | Lost::NotHttp(_)
            | Lost::NotJson(_)
            | Lost::NotKube(_)
            | Lost::NotAList
            | Lost::Unknown => self.fail(words),
        }
    }

    /// The server does not have this version of the API; where it has none, there are no such objects.
    fn lost_version(&mut self) {
        let resource = self.store.resource;
        self.store.resource = resource.next_version().unwrap_or(resource);
        self.ask_for_all();
        self.absent += 1;
        if self.absent < VERSIONS {
            return;
        }
        self.absent = 0;
        self.listed = true;
        self.well();
        let wait = Duration::from_secs(self.rng.u64(ABSENT_SECONDS));
        self.rest(wait);
    }

    /// The version, or the page, is too old: list all, at once for the first time. A list that is given up between its
    /// pages is asked for in one piece.
    fn lost_gone(&mut self, words: String) {
        log::debug!("{}: {words}", self.what());
        let paging = matches!(self.ask, Ask::List { .. });
        self.gone = self.gone.saturating_add(1);
        self.ask_for_all();
        if paging {
            self.watch_list = false;
            self.options.limit = false;
            self.ask = Ask::List { next: String::new(), cached: false };
        }
        if self.gone > 1 {
            self.fail(words);
        }
    }

    /// Leaves out the parameter that the server may not like; false where there is none left.
    fn drop_an_option(&mut self) -> bool {
        let dropped = match self.ask {
            Ask::WatchList { .. } => std::mem::take(&mut self.watch_list),
            Ask::List { .. } => std::mem::take(&mut self.options.limit),
            Ask::Watch => std::mem::take(&mut self.options.bookmarks),
            Ask::Probe => {
                self.suspicious = false;
                self.ask = Ask::Watch;
                self.go_on(Ask::Watch);
                return true;
            }
        };
        if dropped {
            if self.ask == Ask::Watch { self.go_on(Ask::Watch) } else { self.ask_for_all() }
        }
        dropped
    }

    fn spread(&mut self) -> Duration {
        self.spread.mul_f64(self.rng.f64())
    }

    /// Try again after the back-off.
    fn fail(&mut self, words: String) {
        if self.failed.is_none_or(|at| self.now.saturating_duration_since(at) >= FORGET) {
            self.backoff.reset();
            self.failures = 0;
        }
        self.failed = Some(self.now);
        let first = if self.failures == 0 { self.spread() } else { Duration::ZERO };
        self.failures = self.failures.saturating_add(1);
        let wait = self.backoff.delay(&mut self.rng).max(first).max(BACKOFF.0 / 4);
        self.tell(words);
        self.rest(wait);
    }

    fn desync(&mut self) {
        if std::mem::take(&mut self.synced) {
            self.since = self.now;
        }
    }

    /// Once for each state, not for each try.
    fn tell(&mut self, words: String) {
        self.desync();
        if self.error.as_ref() != Some(&words) && self.said < SAID_MAX {
            self.said += 1;
            log::warn!("{}: {words}", self.what());
        }
        self.error = Some(words);
    }
}
