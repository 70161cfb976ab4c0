//! Where the API server is and with which files we come to it. All of them are rotated: they are read when they are
//! needed, and an old content serves while there is no new one.

use crate::{
    clock::Clock,
    config::{Api, KubeConfig},
    kube::{
        access::{self, Access, Pem, Secret, Server, Token},
        tls::{self, Material},
    },
};
use rustls::ClientConnection;
use std::{
    cell::RefCell,
    env, fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// Where Kubernetes puts a ServiceAccount's token and CA into a pod.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// What the agents of k3s and RKE2 make for their own kube-proxy: it may read what a proxy needs.
const AGENTS: [&str; 2] =
    ["/var/lib/rancher/k3s/agent/kubeproxy.kubeconfig", "/var/lib/rancher/rke2/agent/kubeproxy.kubeconfig"];

/// What the system trusts, where no CA is named: Debian and OpenWrt, Fedora.
const SYSTEM_CA: [&str; 2] = ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt"];

/// A token is read again after this: client-go does once a minute, with 10 s of leeway.
const TOKEN_AGE: Duration = Duration::from_secs(50);
/// A refused one is read again at once, but not more often than this.
const TOKEN_AGE_REFUSED: Duration = Duration::from_secs(1);

/// Files larger than this are neither tokens nor certificates.
const FILE_MAX: u64 = 1 << 20;

#[derive(Default)]
struct Cached {
    from: PathBuf,
    token: Option<String>,
    read: Option<Instant>,
}

/// See the module.
pub(crate) struct Credentials {
    config: KubeConfig,
    clock: Clock,
    token: RefCell<Cached>,
}

impl Credentials {
    pub(crate) fn new(config: &KubeConfig, clock: Clock) -> Self {
        Self { config: config.clone(), clock, token: RefCell::default() }
    }

    /// As it is now.
    pub(crate) fn access(&self) -> Result<Access, String> {
        let KubeConfig { api, kubeconfig, token_file, ca_file, .. } = &self.config;
        let mut access = match (api, kubeconfig) {
            (Api::Urls(servers), None) => {
                Access { servers: servers.clone(), ca: None, client: None, server_name: None, token: Token::None }
            }
            (Api::Urls(servers), Some(path)) => Access { servers: servers.clone(), ..kubeconfig_at(path)? },
            (_, Some(path)) => kubeconfig_at(path)?,
            (Api::InCluster, None) => in_cluster()?,
            (Api::Auto, None) => match AGENTS.iter().find(|path| Path::new(path).exists()) {
                Some(path) if !is_in_cluster() => kubeconfig_at(Path::new(path))?,
                Some(_) | None if is_in_cluster() => in_cluster()?,
                Some(_) | None => {
                    return Err(format!(
                        "kube.api = \"auto\": this is no pod, and there is no {}",
                        AGENTS.join(" or ")
                    ));
                }
            },
            (Api::None, None) => return Err("no API server is configured".into()),
        };
        if let Some(path) = token_file {
            access.token = Token::File(path.clone());
        }
        if let Some(path) = ca_file {
            access.ca = Some(Pem::File(path.clone()));
        }
        access.check()?;
        Ok(access)
    }

    /// The token to be shown, if any. While its file is away or empty the one of before serves.
    pub(crate) fn token(&self, access: &Access, refused: bool) -> Option<String> {
        let path = match &access.token {
            Token::None => return None,
            Token::Inline(Secret(token)) => return Some(token.clone()),
            Token::File(path) => path,
        };
        let mut cached = self.token.borrow_mut();
        let now = self.clock.now();
        let age = if refused { TOKEN_AGE_REFUSED } else { TOKEN_AGE };
        let is_fresh = cached.read.is_some_and(|at| now.saturating_duration_since(at) < age);
        if cached.from != *path || !is_fresh {
            let read = read(path).ok().and_then(|bytes| access::token(&String::from_utf8(bytes).ok()?));
            if cached.from != *path {
                *cached = Cached { from: path.clone(), ..Cached::default() };
            }
            cached.token = read.or_else(|| cached.token.take());
            cached.read = Some(now);
        }
        cached.token.clone()
    }

    /// A TLS connection to begin with, where the server wants one.
    pub(crate) fn tls(&self, access: &Access, server: &Server) -> Result<Option<ClientConnection>, String> {
        if !server.tls {
            return Ok(None);
        }
        let of = |pem: &Pem, what: &str| match pem {
            Pem::Inline(Secret(bytes)) => Ok(bytes.clone()),
            Pem::File(path) => read(path).map_err(|e| format!("{what} {}: {e}", path.display())),
        };
        let ca = match &access.ca {
            Some(pem) => of(pem, "the CA's file")?,
            None => {
                let found = SYSTEM_CA.iter().find_map(|path| read(Path::new(path)).ok());
                found.ok_or("no CA is named (kube.ca_file), and the system has none")?
            }
        };
        let client = access.client.as_ref().map(|(certificate, key)| {
            Ok::<_, String>((of(certificate, "the client's certificate")?, of(key, "the client's key")?))
        });
        let client = client.transpose()?;
        let material = Material { ca: &ca, client: client.as_ref().map(|(c, k)| (&c[..], &k[..])) };
        tls::connection(material, access.server_name.as_deref().unwrap_or(&server.host), self.clock).map(Some)
    }
}

fn is_in_cluster() -> bool {
    env::var_os("KUBERNETES_SERVICE_HOST").is_some() && Path::new(ACCOUNT).join("token").exists()
}

fn in_cluster() -> Result<Access, String> {
    let var = |name: &str| env::var(name).ok().filter(|v| !v.is_empty());
    let (Some(host), Some(port)) = (var("KUBERNETES_SERVICE_HOST"), var("KUBERNETES_SERVICE_PORT")) else {
        return Err("this is no pod: KUBERNETES_SERVICE_HOST and _PORT are not in the environment".into());
    };
    let url = if host.contains(':') { format!("https://[{host}]:{port}") } else { format!("https://{host}:{port}") };
    let server =
        Server::parse(&url).ok_or_else(|| format!("{url}: KUBERNETES_SERVICE_HOST and _PORT are no address"))?;
    let account = Path::new(ACCOUNT);
    if !account.join("token").exists() {
        return Err(format!("{ACCOUNT}/token is not there: automountServiceAccountToken is off"));
    }
    Ok(Access {
        servers: vec![server],
        ca: Some(Pem::File(account.join("ca.crt"))),
        client: None,
        server_name: None,
        token: Token::File(account.join("token")),
    })
}

fn kubeconfig_at(path: &Path) -> Result<Access, String> {
    let words = |why: String| format!("kubeconfig {}: {why}", path.display());
    let bytes = read(path).map_err(|e| words(e.to_string()))?;
    let text = String::from_utf8(bytes).map_err(|_| words("it is not UTF-8".into()))?;
    Access::from_kubeconfig(&text, path.parent().unwrap_or_else(|| Path::new("/"))).map_err(words)
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let meta = fs::metadata(path)?;
    if !meta.is_file() || meta.len() > FILE_MAX {
        return Err(io::Error::other("it is no file of up to 1 MiB"));
    }
    fs::read(path)
}
