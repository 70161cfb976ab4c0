//! What may stand on the command line.

use crate::{
    ca,
    config::RelayName,
    proxy::cover::Prefix,
    setup::plan::network as network_of,
    tunnel::identity::{NAME_RULE, NETWORK_RULE, PublicKey, Roles, network_name, node_name},
};
use argh::FromArgs;
use std::path::PathBuf;

pub(super) const SOCKET: &str = "/run/weft/weft.sock";
const CA_DIR: &str = "weft-ca";
/// Two years: long enough to live through without a visit, short enough to be renewed by somebody who remembers.
const DAYS: u64 = 730;

/// The network of a Kubernetes edge cluster in one small executable: names, Services and encrypted paths between
/// gateways behind NATs.
#[derive(FromArgs)]
#[argh(
    example = "{command_name} run --bundle /etc/weft.bundle",
    note = "Exit codes: 0 done, 1 it failed, 2 bad usage, 64 bad configuration."
)]
pub(super) struct Args {
    #[argh(subcommand)]
    pub(super) command: Command,
}

#[derive(FromArgs)]
#[argh(subcommand)]
pub(super) enum Command {
    Run(Run),
    Status(Status),
    Peers(Peers),
    Services(Services),
    Resolve(Resolve),
    Check(Check),
    Setup(Setup),
    Ca(Ca),
    Cleanup(Cleanup),
    Version(Version),
}

/// run the agent
#[derive(FromArgs)]
#[argh(subcommand, name = "run")]
pub(super) struct Run {
    /// the configuration (weft.toml); without it all is as the defaults have it
    #[argh(option, arg_name = "file")]
    pub(super) config: Option<PathBuf>,
    /// the secret that `weft ca issue` wrote for this machine
    #[argh(option, arg_name = "file")]
    pub(super) bundle: Option<PathBuf>,
    /// error, warn, info, debug or trace; else WEFT_LOG, else the configuration says
    #[argh(option, arg_name = "level")]
    pub(super) log: Option<String>,
}

/// tell whether this machine is fit, and what to do where it is not; changes nothing
#[derive(FromArgs)]
#[argh(
    subcommand,
    name = "check",
    note = "Exit codes: 0 where no line says fail, 1 where one does, 2 bad usage, 64 bad configuration."
)]
pub(super) struct Check {
    /// the configuration (weft.toml)
    #[argh(option, arg_name = "file")]
    pub(super) config: Option<PathBuf>,
    /// the secret that `weft ca issue` wrote for this machine
    #[argh(option, arg_name = "file")]
    pub(super) bundle: Option<PathBuf>,
    /// as JSON
    #[argh(switch)]
    pub(super) json: bool,
}

/// tell dnsmasq or systemd-resolved of the cluster's names
#[derive(FromArgs)]
#[argh(subcommand, name = "setup")]
pub(super) struct Setup {
    /// take it back
    #[argh(switch)]
    pub(super) undo: bool,
    /// the configuration (weft.toml), for the domain and the address
    #[argh(option, arg_name = "file")]
    pub(super) config: Option<PathBuf>,
    /// a network whose addresses have names of the cluster (default: 10.0.0.0/8); may be given several times
    #[argh(option, from_str_fn(network_of), arg_name = "network")]
    pub(super) reverse: Vec<Prefix>,
    /// leave the resolver as it runs
    #[argh(switch)]
    pub(super) no_restart: bool,
    /// below which directory the files are (default: /)
    #[argh(option, default = "PathBuf::from(\"/\")", arg_name = "directory")]
    pub(super) root: PathBuf,
}

/// show how the agent is
#[derive(FromArgs)]
#[argh(subcommand, name = "status")]
pub(super) struct Status {
    /// as JSON
    #[argh(switch)]
    pub(super) json: bool,
    /// the agent's admin socket (default: /run/weft/weft.sock)
    #[argh(option, default = "SOCKET.into()", arg_name = "path")]
    pub(super) socket: PathBuf,
}

/// show the peers and the paths to them
#[derive(FromArgs)]
#[argh(subcommand, name = "peers")]
pub(super) struct Peers {
    /// as JSON
    #[argh(switch)]
    pub(super) json: bool,
    /// the agent's admin socket (default: /run/weft/weft.sock)
    #[argh(option, default = "SOCKET.into()", arg_name = "path")]
    pub(super) socket: PathBuf,
}

/// show the Services, or one with its endpoints
#[derive(FromArgs)]
#[argh(subcommand, name = "services")]
pub(super) struct Services {
    /// namespace/name, name.namespace or name
    #[argh(positional)]
    pub(super) name: Option<String>,
    /// go on, and show what has changed, each second
    #[argh(switch)]
    pub(super) watch: bool,
    /// as JSON
    #[argh(switch)]
    pub(super) json: bool,
    /// the agent's admin socket (default: /run/weft/weft.sock)
    #[argh(option, default = "SOCKET.into()", arg_name = "path")]
    pub(super) socket: PathBuf,
}

/// ask the agent's DNS for a name or an address
#[derive(FromArgs)]
#[argh(subcommand, name = "resolve")]
pub(super) struct Resolve {
    /// such as web.shop, web.shop.svc.cluster.local or 10.96.0.10
    #[argh(positional)]
    pub(super) name: String,
    /// as JSON
    #[argh(switch)]
    pub(super) json: bool,
    /// the agent's admin socket (default: /run/weft/weft.sock)
    #[argh(option, default = "SOCKET.into()", arg_name = "path")]
    pub(super) socket: PathBuf,
}

/// keep the cluster's certificate authority
#[derive(FromArgs)]
#[argh(subcommand, name = "ca")]
pub(super) struct Ca {
    #[argh(subcommand)]
    pub(super) command: CaCommand,
}

#[derive(FromArgs)]
#[argh(subcommand)]
pub(super) enum CaCommand {
    Init(CaInit),
    Issue(CaIssue),
    Show(CaShow),
}

/// make a new CA: its key, and the cluster's shared key
#[derive(FromArgs)]
#[argh(subcommand, name = "init")]
pub(super) struct CaInit {
    /// where (default: weft-ca)
    #[argh(option, default = "CA_DIR.into()", arg_name = "directory")]
    pub(super) dir: PathBuf,
}

/// write the bundle that makes a machine a node
#[derive(FromArgs)]
#[argh(
    subcommand,
    name = "issue",
    example = "{command_name} --node relay-1 --role relay\n\
               {command_name} --node edge-1 --relay relay-1@relay.example:7843"
)]
pub(super) struct CaIssue {
    /// the node's name, as Kubernetes has it
    #[argh(option, from_str_fn(name))]
    pub(super) node: String,
    /// the CA (default: weft-ca)
    #[argh(option, default = "CA_DIR.into()", arg_name = "directory")]
    pub(super) dir: PathBuf,
    /// relay, egress or admin; may be given several times
    #[argh(option, from_str_fn(role))]
    pub(super) role: Vec<Roles>,
    /// the node's network: its nodes reach each other without the tunnel
    #[argh(option, default = "String::new()", from_str_fn(network))]
    pub(super) network: String,
    /// for how long (default: 730)
    #[argh(option, default = "DAYS")]
    pub(super) days: u64,
    /// an X25519 public key in base64, where the node keeps its private key to itself
    #[argh(option, from_str_fn(ca::public_key), arg_name = "base64")]
    pub(super) public_key: Option<PublicKey>,
    /// a relay of the node, as name@host:port; may be given several times
    #[argh(option, from_str_fn(relay), arg_name = "name@host:port")]
    pub(super) relay: Vec<RelayName>,
    /// the file to write (default: NODE.bundle)
    #[argh(option, arg_name = "file")]
    pub(super) out: Option<PathBuf>,
}

/// show a bundle, or the CA and what it issued, without the secrets
#[derive(FromArgs)]
#[argh(subcommand, name = "show")]
pub(super) struct CaShow {
    /// a bundle
    #[argh(positional)]
    pub(super) file: Option<PathBuf>,
    /// the CA (default: weft-ca)
    #[argh(option, default = "CA_DIR.into()", arg_name = "directory")]
    pub(super) dir: PathBuf,
    /// as JSON
    #[argh(switch)]
    pub(super) json: bool,
}

/// remove all that a killed agent left in the kernel
#[derive(FromArgs)]
#[argh(subcommand, name = "cleanup")]
pub(super) struct Cleanup {
    /// the admin socket that tells whether an agent still runs (default: /run/weft/weft.sock)
    #[argh(option, default = "SOCKET.into()", arg_name = "path")]
    pub(super) socket: PathBuf,
}

/// show the version
#[derive(FromArgs)]
#[argh(subcommand, name = "version")]
pub(super) struct Version {
    /// as JSON
    #[argh(switch)]
    pub(super) json: bool,
    /// try each cryptographic primitive against known answers
    #[argh(switch)]
    pub(super) self_test: bool,
}

fn name(text: &str) -> Result<String, String> {
    node_name(text).map(Into::into).ok_or_else(|| NAME_RULE.into())
}

fn network(text: &str) -> Result<String, String> {
    network_name(text).map(Into::into).ok_or_else(|| NETWORK_RULE.into())
}

fn role(text: &str) -> Result<Roles, String> {
    Roles::named(text).ok_or_else(|| "expected relay, egress or admin".into())
}

fn relay(text: &str) -> Result<RelayName, String> {
    text.parse().map_err(str::to_owned)
}
