//! `[kube]`.

use super::{
    Api, ConfigError, KubeConfig, ServerKind,
    raw::RawKube,
    resolve::{PATH, Put, path},
};
use crate::kube::{access, convert::check_name};

/// Two watches for each; more are refused.
const NAMESPACES_MAX: usize = 16;

impl Default for KubeConfig {
    fn default() -> Self {
        Self {
            api: Api::None,
            kubeconfig: None,
            token_file: None,
            ca_file: None,
            namespaces: Vec::new(),
            server: ServerKind::Auto,
            proxy: None,
            manifests: Vec::new(),
        }
    }
}

impl Put<'_> {
    pub(super) fn kube(&self, c: &mut KubeConfig, raw: RawKube) -> Result<(), ConfigError> {
        self.value(&mut c.kubeconfig, "kube.kubeconfig", raw.kubeconfig, PATH, |s| path(s).map(Some))?;
        self.value(&mut c.ca_file, "kube.ca_file", raw.ca_file, PATH, |s| path(s).map(Some))?;
        let token_at = raw.token_file.clone();
        self.value(&mut c.token_file, "kube.token_file", raw.token_file, PATH, |s| path(s).map(Some))?;
        let api = "\"none\", \"auto\", \"in-cluster\", or addresses of one cluster such as https://192.0.2.1:6443";
        self.value(&mut c.api, "kube.api", raw.api, api, |s| match s.as_str() {
            "none" => Some(Api::None),
            "auto" => Some(Api::Auto),
            "in-cluster" => Some(Api::InCluster),
            urls => access::servers(urls).map(Api::Urls),
        })?;
        if let (Api::Urls(servers), Some(at)) = (&c.api, &token_at)
            && servers.iter().any(|s| !s.tls && !s.is_local())
        {
            let what = "a token is not sent over plain http to another machine; expected https in kube.api";
            return Err(self.error(at, "kube.token_file", what));
        }
        let beyond = raw.namespaces.as_ref().and_then(|list| list.get(NAMESPACES_MAX)).cloned();
        let namespace = "a namespace's name, of 1 to 63 characters a-z, 0-9 and '-'";
        self.list(&mut c.namespaces, "kube.namespaces", raw.namespaces, namespace, |s| {
            check_name("", s, true).is_ok().then(|| s.into())
        })?;
        if let Some(at) = beyond {
            return Err(self.error(&at, "kube.namespaces", format!("more than {NAMESPACES_MAX} of them")));
        }
        c.namespaces.sort();
        c.namespaces.dedup();
        let kinds =
            [("auto", ServerKind::Auto), ("apiserver", ServerKind::ApiServer), ("metaserver", ServerKind::MetaServer)];
        self.choice(&mut c.server, "kube.server", raw.server, &kinds)?;
        self.way_out(&mut c.proxy, "kube.proxy", raw.proxy)?;
        self.list(&mut c.manifests, "kube.manifests", raw.manifests, "a path", |s| path(s).map(|_| s.into()))
    }
}
