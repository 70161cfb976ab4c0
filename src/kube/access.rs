//! Where an API server is and how we prove who we are, as a kubeconfig or our own configuration says. Files are named
//! here and read by the driver, each time that they are needed: they are rotated.

use super::yaml::Yaml;
use crate::encoding::BASE64;
use std::{fmt, net::Ipv4Addr, path::Path, path::PathBuf};

/// Addresses of one cluster; more are refused.
const SERVERS_MAX: usize = 8;

/// A token of a ServiceAccount has some 1,000 bytes.
const TOKEN_MAX: usize = 64 << 10;

/// Is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret<T>(pub T);

impl<T> fmt::Debug for Secret<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// PEM, or where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pem {
    Inline(Secret<Vec<u8>>),
    File(PathBuf),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Token {
    None,
    Inline(Secret<String>),
    File(PathBuf),
}

/// One address of the API server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    pub tls: bool,
    /// A name or an address, without brackets.
    pub host: String,
    pub port: u16,
}

impl Server {
    /// `https://host:port`; None where it is anything else or more.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (tls, rest) = match text.split_once("://")? {
            ("https", rest) => (true, rest),
            ("http", rest) => (false, rest),
            _ => return None,
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (host, port) = match rest.strip_prefix('[') {
            Some(v6) => {
                let (host, port) = v6.split_once(']')?;
                host.parse::<std::net::Ipv6Addr>().ok()?;
                (host, if port.is_empty() { None } else { Some(port.strip_prefix(':')?) })
            }
            None => rest.split_once(':').map_or((rest, None), |(host, port)| (host, Some(port))),
        };
        let valid = |b: u8| b.is_ascii_alphanumeric() || b"-._:".contains(&b);
        if host.is_empty() || host.len() > 253 || !host.bytes().all(valid) {
            return None;
        }
        let port = match port {
            None => {
                if tls {
                    443
                } else {
                    80
                }
            }
            Some(port) => port.parse().ok().filter(|p| *p > 0)?,
        };
        Some(Self { tls, host: host.into(), port })
    }

    /// As it stands in a URL and in the Host header.
    #[must_use]
    pub fn authority(&self) -> String {
        let Self { host, port, .. } = self;
        if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
    }

    /// What is sent there stays on this machine.
    #[must_use]
    pub fn is_local(&self) -> bool {
        self.host == "localhost" || self.host.parse().is_ok_and(|ip: std::net::IpAddr| ip.is_loopback())
    }

    /// KubeEdge's metaServer: its port, and the address of its own device.
    #[must_use]
    pub fn is_metaserver(&self) -> bool {
        self.port == 10_550 || self.host.parse() == Ok(Ipv4Addr::new(169, 254, 30, 10))
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", if self.tls { "https" } else { "http" }, self.authority())
    }
}

/// All that a connection needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    /// At least one; all of one cluster, and all with TLS or all without.
    pub servers: Vec<Server>,
    /// None: the certificates that the system trusts.
    pub ca: Option<Pem>,
    /// Certificate and key.
    pub client: Option<(Pem, Pem)>,
    /// The name in the server's certificate, where it is not the host.
    pub server_name: Option<String>,
    pub token: Token,
}

/// Several URLs, parted by commas or blanks.
#[must_use]
pub fn servers(text: &str) -> Option<Vec<Server>> {
    let urls = text.split([',', ' ']).filter(|part| !part.is_empty());
    let servers = urls.map(Server::parse).collect::<Option<Vec<_>>>()?;
    let all_alike = servers.iter().all(|s| s.tls == servers[0].tls);
    (!servers.is_empty() && servers.len() <= SERVERS_MAX && all_alike).then_some(servers)
}

impl Access {
    /// # Errors
    /// Where a secret would cross a network in the clear.
    pub fn check(&self) -> Result<(), String> {
        let open = self.servers.iter().find(|s| !s.tls && !s.is_local());
        match open {
            Some(server) if self.token != Token::None => {
                Err(format!("{server}: a token is not sent over plain http to another machine; use https"))
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Reads a kubeconfig; relative paths in it begin at `directory`.
    ///
    /// # Errors
    /// What is missing in it, or not done here.
    pub fn from_kubeconfig(text: &str, directory: &Path) -> Result<Self, String> {
        let root = Yaml::parse(text).map_err(|e| e.to_string())?;
        let named = |list: &str, name: &str, inner: &str| {
            let found = root.get(list).list().iter().find(|item| item.get("name").text() == Some(name));
            found.map(|item| item.get(inner).clone()).ok_or_else(|| format!("{list} has no {name:?}"))
        };
        let name = root.get("current-context").text().ok_or("there is no current-context")?;
        let context = named("contexts", name, "context")?;
        let of_context = |key: &str| context.get(key).text().ok_or_else(|| format!("context {name:?} has no {key}"));
        let cluster = named("clusters", of_context("cluster")?, "cluster")?;
        let user = match context.get("user").text() {
            Some(user) => named("users", user, "user")?,
            None => Yaml::Null,
        };
        let field = |at: &Yaml, key: &str| at.get(key).text().filter(|t| !t.is_empty()).map(str::to_owned);
        for (at, key, instead) in [
            (&user, "exec", "a token (tokenFile) or a client certificate"),
            (&user, "auth-provider", "a token (tokenFile) or a client certificate"),
            (&user, "username", "a token or a client certificate: API servers know no passwords since 1.19"),
            (&user, "as", "a user that has the rights itself"),
            (&cluster, "proxy-url", "kube.proxy of our own configuration"),
        ] {
            if *at.get(key) != Yaml::Null {
                return Err(format!("{key} is not done here; use {instead}"));
            }
        }
        if field(&cluster, "insecure-skip-tls-verify").as_deref() == Some("true") {
            return Err("insecure-skip-tls-verify is not done here; name the CA in certificate-authority".into());
        }
        let pem = |at: &Yaml, key: &str| match (field(at, &format!("{key}-data")), field(at, key)) {
            (Some(data), _) => {
                let data: String = data.split_whitespace().collect();
                let bytes = BASE64.decode(data.as_bytes()).map_err(|_| format!("{key}-data is not base64"))?;
                Ok::<_, String>(Some(Pem::Inline(Secret(bytes))))
            }
            (None, Some(path)) => Ok(Some(Pem::File(directory.join(path)))),
            (None, None) => Ok(None),
        };
        let url = field(&cluster, "server").ok_or("the cluster has no server")?;
        let server = Server::parse(&url).ok_or_else(|| format!("server {url:?}: expected https://HOST:PORT"))?;
        let client = match (pem(&user, "client-certificate")?, pem(&user, "client-key")?) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            _ => return Err("of client-certificate and client-key one is missing".into()),
        };
        // As in client-go, the file wins: it is the one that is rotated.
        let token = match (field(&user, "tokenFile"), field(&user, "token")) {
            (Some(path), _) => Token::File(directory.join(path)),
            (None, Some(text)) => Token::Inline(Secret(token(&text).ok_or("token has a character that none has")?)),
            (None, None) => Token::None,
        };
        let access = Self {
            servers: vec![server],
            ca: pem(&cluster, "certificate-authority")?,
            client,
            server_name: field(&cluster, "tls-server-name"),
            token,
        };
        access.check()?;
        Ok(access)
    }
}

/// What a file of a token holds, without the line end; None where it is empty or no token.
#[must_use]
pub fn token(text: &str) -> Option<String> {
    let token = text.trim();
    let valid = (1..=TOKEN_MAX).contains(&token.len()) && token.bytes().all(|b| b.is_ascii_graphic());
    valid.then(|| token.to_owned())
}

#[cfg(test)]
mod tests;
