//! What is watched, and the requests for it.

use super::{http::escape, item::Kind};
use crate::table::{model::Name, scope::Scope};

/// Items of one page, as client-go asks for. Each is cut out of the stream and forgotten: this spares the server.
const PAGE: u32 = 500;

/// Versions of Istio's API, all with one schema; the first that the server has is used. EdgeMesh brings the last alone.
const ISTIO: [&str; 3] =
    ["/apis/networking.istio.io/v1", "/apis/networking.istio.io/v1beta1", "/apis/networking.istio.io/v1alpha3"];

/// One kind of objects of the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    Services,
    Slices,
    /// Where the API has no EndpointSlices.
    Endpoints,
    Nodes,
    /// Only where the names of Pods are verified.
    Pods,
    /// DestinationRules, by the number of the API's version.
    Rules(usize),
}

impl Resource {
    /// The first version of DestinationRules to be asked for: metaServer keeps by version what EdgeMesh asked it for.
    #[must_use]
    pub fn rules(metaserver: bool) -> Self {
        Self::Rules(if metaserver { ISTIO.len() - 1 } else { 0 })
    }

    /// The same in the next version, where it has several.
    #[must_use]
    pub fn next_version(self) -> Option<Self> {
        match self {
            Self::Rules(version) => Some(Self::Rules((version + 1) % ISTIO.len())),
            Self::Services | Self::Slices | Self::Endpoints | Self::Nodes | Self::Pods => None,
        }
    }

    /// As rules of RBAC name it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Services => "services",
            Self::Slices => "endpointslices",
            Self::Endpoints => "endpoints",
            Self::Nodes => "nodes",
            Self::Pods => "pods",
            Self::Rules(_) => "destinationrules",
        }
    }

    fn group(self) -> &'static str {
        match self {
            Self::Services | Self::Endpoints | Self::Nodes | Self::Pods => "/api/v1",
            Self::Slices => "/apis/discovery.k8s.io/v1",
            Self::Rules(version) => ISTIO[version % ISTIO.len()],
        }
    }

    #[must_use]
    pub fn kind(self) -> Kind {
        match self {
            Self::Services => Kind::Service,
            Self::Slices => Kind::EndpointSlice,
            Self::Endpoints => Kind::Endpoints,
            Self::Nodes => Kind::Node,
            Self::Pods => Kind::Pod,
            Self::Rules(_) => Kind::Rule,
        }
    }

    /// Whether the table is of use without it.
    #[must_use]
    pub fn is_needed(self) -> bool {
        match self {
            Self::Services | Self::Slices | Self::Endpoints => true,
            Self::Nodes | Self::Pods | Self::Rules(_) => false,
        }
    }

    /// What is left out at the source. Headless Services and those of other proxies stay: DNS answers for them.
    fn selector(self, metaserver: bool) -> Option<(&'static str, &'static str)> {
        match self {
            // Slices without it belong to no Service.
            Self::Slices => Some(("labelSelector", "kubernetes.io/service-name")),
            // metaServer knows no other field than the name.
            Self::Pods if !metaserver => Some(("fieldSelector", "status.phase!=Succeeded,status.phase!=Failed")),
            Self::Services | Self::Endpoints | Self::Nodes | Self::Pods | Self::Rules(_) => None,
        }
    }

    #[must_use]
    pub fn scope(self, namespace: Option<&Name>) -> Scope {
        match self {
            Self::Services => Scope::Services(namespace.cloned()),
            Self::Slices | Self::Endpoints => Scope::Slices(namespace.cloned()),
            Self::Nodes => Scope::Nodes,
            Self::Pods => Scope::Pods(namespace.cloned()),
            Self::Rules(_) => Scope::Rules(namespace.cloned()),
        }
    }
}

/// One request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    List {
        /// Where the page begins; empty: the first.
        next: String,
        /// Any state that the server has in its cache will do.
        cached: bool,
    },
    /// The least list that there is, for its version.
    Probe,
    /// All objects, and then every change.
    WatchList {
        cached: bool,
    },
    Watch,
}

/// Parameters that one server or the other does not like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    pub limit: bool,
    pub bookmarks: bool,
    /// Seconds after which the server ends a watch.
    pub timeout: u32,
    pub metaserver: bool,
}

/// Path and query. The order is always the same: metaServer shares only requests that are equal.
#[must_use]
pub fn target(resource: Resource, namespace: Option<&str>, ask: &Ask, options: Options, version: &str) -> String {
    let mut out = String::from(resource.group());
    if let Some(namespace) = namespace.filter(|_| resource != Resource::Nodes) {
        out.push_str("/namespaces/");
        escape(namespace, &mut out);
    }
    out.push('/');
    out.push_str(resource.name());
    let mut sign = '?';
    let mut put = |key: &str, value: &str| {
        out.push(std::mem::replace(&mut sign, '&'));
        out.push_str(key);
        out.push('=');
        escape(value, &mut out);
    };
    if let Some((key, selector)) = resource.selector(options.metaserver) {
        put(key, selector);
    }
    match ask {
        Ask::List { next, cached } => {
            if options.limit {
                put("limit", &PAGE.to_string());
            }
            if !next.is_empty() {
                put("continue", next);
            } else if *cached {
                put("resourceVersion", "0");
            }
        }
        Ask::Probe => put("limit", "1"),
        Ask::WatchList { cached } => {
            put("watch", "1");
            put("sendInitialEvents", "true");
            put("resourceVersionMatch", "NotOlderThan");
            put("allowWatchBookmarks", "true");
            if *cached {
                put("resourceVersion", "0");
            }
            put("timeoutSeconds", &options.timeout.to_string());
        }
        Ask::Watch => {
            put("watch", "1");
            if options.bookmarks {
                put("allowWatchBookmarks", "true");
            }
            // metaServer begins every watch with all that it has, whatever the version.
            if !options.metaserver {
                put("resourceVersion", version);
            }
            put("timeoutSeconds", &options.timeout.to_string());
        }
    }
    out
}
