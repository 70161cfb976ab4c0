//! `weft check`: looks at this machine, tries what can be tried without leaving a trace, and says what to do.

pub mod kernel;
pub mod line;
pub mod network;
pub mod node;

pub use line::{Line, Report, Verdict};

use crate::{
    admin::{self, view},
    app, ca,
    config::{Backend, Config},
    disk, holder, iptables, links, netlink, nft,
    proxy::rules::{self, Catch, Desired},
    setup, snapshot,
    sorted::Set,
    sys,
    table::Table,
    trial,
    tunnel::identity::Bundle,
};
use kernel::{Others, Writers};
pub use node::{Asked, value};
use std::{
    fs,
    io::Read as _,
    net::{IpAddr, Ipv4Addr},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

/// An edgecore.yaml has 10 kB; more is not read.
const FILE_MAX: u64 = 1 << 20;
/// Where Cilium pins its programs for sockets.
const CILIUM_SOCKETS: &str = "/sys/fs/bpf/cilium/socketlb/links/cgroup/cil_sock4_connect";
const EDGECORE: &str = "/etc/kubeedge/config/edgecore.yaml";
const KUBELET: &str = "/var/lib/kubelet/config.yaml";

/// Looks at everything, in the order in which it is best mended.
#[must_use]
pub fn run(mut config: Config, bundle: Option<PathBuf>) -> Report {
    config.node.bundle = bundle.or(config.node.bundle);
    let status = settled(&config.admin.socket);
    let mut report = Report::default();
    let mut here = Here { config: &config, status, report: &mut report };
    here.kernel();
    let bundle = here.node();
    here.network(bundle);
    report
}

/// What is looked at, and by what.
struct Here<'c> {
    config: &'c Config,
    /// Of an agent that is at work.
    status: Option<view::Status>,
    report: &'c mut Report,
}

impl Here<'_> {
    fn say(&mut self, line: Line) {
        self.report.push(line);
    }

    fn kernel(&mut self) {
        let (dns, proxy) = (&self.config.dns, &self.config.proxy);
        self.say(kernel::rights(&text("/proc/self/status")));
        if dns.enable || proxy.enable {
            let made = netlink::try_device().map_err(|e| format!("{e:#}"));
            self.say(kernel::device(made));
            let mut writers = Writers {
                wanted: proxy.backend,
                nft: (proxy.backend != Backend::Iptables).then(|| self.rehearse()),
                flavour: iptables::flavour().map(Into::into),
                iptables: None,
                legacy: iptables::has_legacy_tables(),
            };
            let by_iptables = writers.wants_iptables();
            if by_iptables && writers.flavour.is_some() {
                writers.iptables = Some(crate::reactor::block_on(iptables::attempt()).map_err(|e| format!("{e:#}")));
            }
            self.say(kernel::rules(&writers));
            let closed = nft::closed_ways(dns.listen.ip(), by_iptables).unwrap_or_default();
            self.say(kernel::input(&closed, &dns.listen.ip().to_string()));
            let (others, links) = (programs(), interfaces());
            let has = |name: &str| others.contains(name);
            let ipvs = links.contains("kube-ipvs0") || text("/proc/net/ip_vs").lines().count() > 3;
            let others = Others {
                cilium_sockets: Path::new(CILIUM_SOCKETS).exists(),
                cilium: links.contains("cilium_host") || has("cilium-agent"),
                ipvs,
                kube_proxy: has("kube-proxy"),
                edgemesh: has("edgemesh-agent"),
            };
            kernel::others(others).into_iter().for_each(|line| self.say(line));
        }
        self.say(kernel::forward(&text("/proc/sys/net/ipv4/ip_forward")));
        let of = |what: &str| text(&["/proc/sys/net/netfilter/nf_conntrack_", what].concat());
        self.say(kernel::conntrack(&of("count"), &of("max")));
        if let Ok(limit) = sys::raise_nofile() {
            self.say(kernel::files(limit));
        }
    }

    /// Two rules, of either kind that we write.
    fn rehearse(&self) -> Result<(), String> {
        let Config { dns, proxy, .. } = self.config;
        let own = dns.listen.ip();
        let catch = Catch::new(&proxy.interfaces, &Set::from(["lo".to_owned()]))?;
        let rule = |port, action| rules::Rule {
            address: Ipv4Addr::new(192, 0, 2, 1).into(),
            protocol: crate::table::model::Protocol::Tcp,
            port,
            action,
        };
        let rules = vec![rule(1, rules::Action::Redirect(1)), rule(2, rules::Action::Refuse)];
        let desired = Desired { address: own, mark: proxy.mark, catch, rules, outside: vec![], left_out: 0 };
        nft::attempt(&desired).map_err(|e| format!("{e:#}"))
    }

    /// Clock, disk, bundle, name, and the cluster's parts on this machine.
    fn node(&mut self) -> Option<Bundle> {
        let config = self.config;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        self.say(node::clock(now));
        let directory = &config.node.state_dir;
        let (written, free) = trial::write(directory);
        self.say(node::disk(&directory.display().to_string(), written, disk::medium(directory), free));
        let read =
            config.node.bundle.as_deref().map(|p| (ca::read_bundle(p).map_err(|e| format!("{e:#}")), is_private(p)));
        let (bundle, private) = read.unzip();
        let is_known = bundle.as_ref().map(|b| b.as_ref().map_err(Clone::clone));
        // As the agent does with a clock that was never set.
        let then = now.max(crate::clock::BUILT);
        let line = node::bundle(is_known, private.unwrap_or(true), config.tunnel.enable, then);
        self.say(line);
        let bundle = bundle.and_then(Result::ok);

        let yaml = Some(text(EDGECORE)).filter(|t| !t.is_empty());
        let host = text("/proc/sys/kernel/hostname");
        let name = app::name(config, bundle.as_ref(), &host).map_err(|e| format!("{e:#}"));
        let called_us = name.as_deref().unwrap_or_default();
        let mut asked = yaml.as_ref().map_or_else(Asked::default, |y| trial::meta_server(y, config, called_us));
        let api = config.kube.follows().then(|| trial::api(config, called_us));
        asked.node = asked.node.or_else(|| api.as_ref().and_then(|a| a.node));
        let called = yaml.as_ref().and_then(|y| node::value(y, &["modules", "edged", "hostnameOverride"]).pop());
        self.say(node::name(name.as_deref().map_err(Clone::clone), called.as_deref(), asked.node));
        if let Some(yaml) = &yaml {
            self.say(node::meta_server(yaml, &asked));
        }
        if let Some(api) = api {
            self.say(node::api(&api));
        }
        let kubelet = Some(text(KUBELET)).filter(|t| !t.is_empty());
        let (ours, take_over) = (config.dns.listen.ip().to_string(), config.dns.take_over.is_some());
        if config.dns.enable {
            node::cluster_dns(yaml.as_deref(), kubelet.as_deref(), &ours, take_over)
                .into_iter()
                .for_each(|l| self.say(l));
        }
        bundle
    }

    fn network(&mut self, bundle: Option<Bundle>) {
        let config = self.config;
        let around = netlink::surroundings().unwrap_or_default();
        let mut out: Set<String> = around.default_interfaces.clone();
        out.extend(links::default_interfaces_v6(&text("/proc/net/ipv6_route")));
        let out: Vec<String> = out.into_iter().collect();
        self.say(network::route(&out, &self.vips(), &around.taken));
        let mtu =
            |name: &String| Some((name.clone(), text(&format!("/sys/class/net/{name}/mtu")).trim().parse().ok()?));
        let at_work = self.status.is_some();
        let peers = at_work.then(|| admin::ask::<view::Peers>(&config.admin.socket, "peers").ok()).flatten();
        let peers = peers.map_or_else(Vec::new, |(_, p)| p.peers);
        self.say(network::mtu(&out.iter().filter_map(mtu).collect::<Vec<_>>(), &peers));
        if config.dns.enable {
            let listen = config.dns.listen;
            let holder = holder::of(listen, false).or_else(|| holder::of(listen, true));
            let done = setup::is_done(Path::new("/"));
            self.say(network::port53(&listen.to_string(), holder.as_deref(), done));
            let resolver = setup::resolvers(Path::new("/")).first().map(|r| r.name());
            self.say(network::resolver(resolver, done));
            for at in config.dns.listen_also.iter().filter(|_| !at_work) {
                let trouble = trial::bind(*at, false).or_else(|| trial::bind(*at, true));
                self.say(network::bind("dns-port", "dns.listen_also", &at.to_string(), trouble.as_deref()));
            }
        }
        if let (true, Some(bundle)) = (config.tunnel.enable, bundle) {
            let mut free = true;
            if !at_work {
                let trouble = trial::bind(config.tunnel.listen, false);
                free = trouble.is_none();
                let at = config.tunnel.listen.to_string();
                self.say(network::bind("tunnel-port", "tunnel.listen", &at, trouble.as_deref()));
            }
            let (relays, nat) = match &self.status {
                Some(status) => (status.relays.clone(), status.nat.clone()),
                None => trial::relays(config, bundle, free),
            };
            if !config.relay.enable || !relays.is_empty() {
                network::relays(&relays, &nat).into_iter().for_each(|line| self.say(line));
            }
        }
        self.agent();
    }

    /// Addresses of Services, as far as they are known without asking anybody.
    fn vips(&self) -> Vec<Ipv4Addr> {
        let table = crate::shared::Writer::new(Table::default());
        app::feed(&table, &self.config.services);
        snapshot::find(&self.config.node.state_dir).pour(&table);
        let v4 = |ip: &IpAddr| if let IpAddr::V4(v4) = ip { Some(*v4) } else { None };
        table.reader().read(|t| t.services().flat_map(|s| s.vips.iter().filter_map(v4)).collect())
    }

    fn agent(&mut self) {
        let lines = match &self.status {
            None => vec![line::ok("agent", &["none is at work"])],
            Some(status) => {
                let troubles = status.sources.iter().filter(|s| !s.error.is_empty());
                let mut out: Vec<Line> =
                    troubles.map(|s| line::warn("agent", &[&s.name, ": ", &s.error], &["mend that source"])).collect();
                out.extend(status.warnings.iter().map(|w| line::warn("agent", &[w], &["see `weft status`"])));
                if out.is_empty() {
                    out.push(line::ok("agent", &["weft ", &status.version, " is at work as ", &status.node]));
                }
                out
            }
        };
        lines.into_iter().for_each(|line| self.say(line));
    }
}

/// What an agent at work tells, once its relays have answered or have had their time since its start.
fn settled(socket: &Path) -> Option<view::Status> {
    let ask = || Some(admin::ask::<view::Status>(socket, "status").ok()?.1);
    let mut status = ask()?;
    for _ in 0..trial::RELAYS.as_millis() / trial::LOOK.as_millis() {
        if status.uptime_secs >= trial::RELAYS.as_secs() || status.relays.iter().all(|r| r.registered) {
            break;
        }
        std::thread::sleep(trial::LOOK);
        status = ask()?;
    }
    Some(status)
}

fn text(path: &str) -> String {
    let mut out = String::new();
    let read = fs::File::open(path).and_then(|file| file.take(FILE_MAX).read_to_string(&mut out));
    read.map_or_else(|_| String::new(), |_| out)
}

fn is_private(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|m| m.mode() & 0o077 == 0)
}

fn interfaces() -> Set<String> {
    let entries = fs::read_dir("/sys/class/net").into_iter().flatten().flatten();
    entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect()
}

/// Names of the programs that run in our network namespace.
fn programs() -> Set<String> {
    let ours = fs::read_link("/proc/self/ns/net").ok();
    let mut out = Set::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let path = process.path();
        let Ok(name) = fs::read_to_string(path.join("comm")) else { continue };
        // 15 bytes of a name are all that the kernel keeps.
        if fs::read_link(path.join("ns/net")).ok() == ours {
            out.insert(name.trim_end().to_owned());
        }
    }
    out
}
