//! What `weft status` tells of the parts and of what feeds the table.

use super::{checks, wants_kernel};
use crate::{
    admin::{health, view},
    api,
    clock::Clock,
    config::Config,
    kube::Sources,
    rules,
    shared::Reader,
    snapshot,
    table::{Table, model::Source},
    tunnel::{self, identity::Bundle},
};
use std::net::SocketAddr;

/// Where each part is, and the readers of what it tells; None: it is off.
pub(super) struct Shown {
    pub(super) config: Config,
    /// Without its secrets.
    pub(super) bundle: Option<Bundle>,
    pub(super) clock: Clock,
    pub(super) table: Reader<Table>,
    pub(super) manifests: Sources,
    pub(super) api: Option<api::Status>,
    pub(super) dns_port: Option<u16>,
    pub(super) proxy_port: Option<u16>,
    pub(super) rules: Option<Reader<rules::Status>>,
    pub(super) tunnel: Option<(SocketAddr, tunnel::Handle)>,
    pub(super) kept: Reader<snapshot::Status>,
}

impl Shown {
    pub(super) fn parts(&self) -> Vec<view::Part> {
        let part = |name: &str, enabled: bool, note: Option<String>| {
            let on = note.is_some();
            let why = if enabled { "it needs a bundle" } else { "the configuration says so" };
            view::Part { name: name.into(), on, note: note.unwrap_or_else(|| why.into()) }
        };
        let Config { dns, proxy, tunnel, relay, .. } = &self.config;
        let ip = dns.listen.ip();
        let load = self.tunnel.as_ref().and_then(|(_, handle)| handle.relay_load());
        vec![
            part("dns", dns.enable, self.dns_port.map(|port| self.dns_note(port))),
            part("proxy", proxy.enable, self.proxy_port.map(|port| format!("TCP, served at {ip}:{port}"))),
            part("rules", dns.enable || proxy.enable, self.rules.as_ref().map(|r| r.read(rules_note))),
            part("tunnel", tunnel.enable, self.tunnel.as_ref().map(|(at, _)| format!("UDP {at}"))),
            self.kept.read(|kept| view::Part {
                name: "snapshot".into(),
                on: kept.trouble.is_none(),
                note: kept.note(self.clock.now()),
            }),
            part("relay", relay.enable, load.map(|l| format!("{} nodes, {} flows", l.nodes, l.flows))),
        ]
    }

    fn dns_note(&self, port: u16) -> String {
        let dns = &self.config.dns;
        let mut note = format!("{}, served at {}:{port}", dns.listen, dns.listen.ip());
        dns.listen_also.iter().for_each(|also| note += &format!("; {also}"));
        note
    }

    pub(super) fn sources(&self) -> Vec<view::Source> {
        let objects = self.table.read(|t| t.objects(Source::Config));
        let config = (objects > 0).then(|| view::Source {
            name: "[[service]]".into(),
            synced: true,
            objects,
            since_secs: None,
            error: String::new(),
        });
        let now = self.clock.now();
        let api = self.api.iter().flat_map(api::Status::list);
        let followed = self.manifests.list().into_iter().chain(api).map(|s| view::Source {
            name: s.name,
            synced: s.synced,
            objects: s.objects,
            since_secs: s.since.map(|at| now.saturating_duration_since(at).as_secs()),
            error: s.last_error.unwrap_or_default(),
        });
        config.into_iter().chain(followed).collect()
    }

    pub(super) fn unwell(&self) -> Option<String> {
        let rules = self.rules.as_ref().map(|r| r.read(|r| (r.good, r.errors.clone())));
        let (rules, errors) = rules.unwrap_or_default();
        let signs = health::Signs {
            wants_rules: wants_kernel(&self.config),
            synced: self.table.read(Table::synced),
            rules,
            errors: &errors,
            period: rules::RECHECK,
        };
        health::unwell(&signs, self.clock.now())
    }

    pub(super) fn warnings(&self) -> Vec<String> {
        let mut out = checks::warnings(&self.config, self.bundle.as_ref(), self.clock.unix());
        let absent = |(namespace, name): &&(String, String)| {
            self.table.read(|t| t.synced() && t.service(namespace, name).is_none())
        };
        if let Some((namespace, name)) = self.config.dns.take_over.as_ref().filter(absent) {
            out.push(format!("dns.take_over: there is no Service {namespace}/{name}"));
        }
        if let Some(rules) = &self.rules {
            out.extend(rules.read(|r| r.errors.iter().chain(&r.notes).cloned().collect::<Vec<_>>()));
        }
        out.extend(self.kept.read(|kept| kept.trouble.clone()));
        out
    }
}

fn rules_note(r: &rules::Status) -> String {
    if r.version.is_none() {
        return "none yet".into();
    }
    format!("{} rules ({}), weft0 is a {} with {} routes", r.rules, r.backend, r.device, r.routes)
}
