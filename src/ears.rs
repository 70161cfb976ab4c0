//! What tells of changes that others make to what is ours in the kernel, or beside it.

use crate::{netlink::Monitor, nft};
use futures_lite::future::or;
use std::io;

/// See the module.
#[derive(Debug)]
pub(crate) struct Ears {
    links: Option<Monitor>,
    tables: Option<nft::Monitor>,
    /// Something was heard about tables of nf_tables.
    pub(crate) heard: bool,
}

impl Ears {
    pub(crate) fn new() -> Self {
        let links = Monitor::of_both_families().map_err(|e| log::warn!("{e:#}")).ok();
        // Kernels without nf_tables, and users without rights: the look each 30 s is enough.
        let tables = nft::Monitor::open().map_err(|e| log::debug!("{e:#}")).ok();
        Self { links, tables, heard: false }
    }

    /// Resolves at the next change; never where we cannot hear of them.
    pub(crate) async fn changed(&mut self) {
        let Self { links, tables, heard } = self;
        or(
            listen(links, async |m: &Monitor| m.changed().await),
            listen(tables, async |m: &nft::Monitor| m.changed().await.map(|()| *heard = true)),
        )
        .await;
    }
}

async fn listen<M>(monitor: &mut Option<M>, changed: impl AsyncFnOnce(&M) -> io::Result<()>) {
    if let Some(open) = monitor {
        match changed(open).await {
            Ok(()) => return,
            Err(e) => {
                log::warn!("changes of the network are seen only each {} s: {e}", crate::rules::RECHECK.as_secs())
            }
        }
    }
    *monitor = None;
    std::future::pending().await
}
