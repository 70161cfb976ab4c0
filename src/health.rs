//! `[admin] http`: /healthz and /livez, for a kubelet, a service manager or a load balancer.

use crate::{
    admin::{
        Shown,
        health::{HEAD_MAX, answer, is_whole},
    },
    reactor::{Async, LocalExecutor, Timer},
};
use anyhow::Context;
use async_lock::Semaphore;
use futures_lite::{AsyncReadExt, AsyncWriteExt, future::or};
use std::{
    io,
    net::{SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    time::Duration,
};

/// Clients at once; more wait in the kernel's queue, and none keeps its place longer than [`PATIENCE`].
const CLIENTS_MAX: usize = 8;
/// For the whole of a conversation: a kubelet waits for 1 s unless it is told another time.
const PATIENCE: Duration = Duration::from_secs(2);
/// After an accept failed: no descriptors are left.
const ACCEPT_AGAIN: Duration = Duration::from_millis(200);

/// The server; see the module.
pub struct Health {
    listener: Async<TcpListener>,
    views: Shown,
}

impl Health {
    /// # Errors
    /// When the address cannot be had.
    pub fn bind(at: SocketAddr, views: Shown) -> anyhow::Result<Self> {
        let listener = Async::<TcpListener>::bind(at).with_context(|| format!("admin.http: cannot listen on {at}"))?;
        log::info!("/healthz and /livez at http://{at}");
        Ok(Self { listener, views })
    }

    /// Serves for ever.
    ///
    /// # Errors
    /// Never.
    pub async fn run(self) -> anyhow::Result<()> {
        let tasks = LocalExecutor::new();
        let places = Arc::new(Semaphore::new(CLIENTS_MAX));
        let accept = async {
            loop {
                let place = places.acquire_arc().await;
                let Ok((client, _)) = self.listener.accept().await else {
                    Timer::after(ACCEPT_AGAIN).await;
                    continue;
                };
                let views = self.views.clone();
                let talk = async move {
                    let _place = place;
                    let late = async {
                        Timer::after(PATIENCE).await;
                        Ok(())
                    };
                    // A client that has gone away wants no answer.
                    let _ = or(serve(client, &views), late).await;
                };
                tasks.spawn(talk).detach();
            }
        };
        tasks.run(accept).await
    }
}

async fn serve(mut client: Async<TcpStream>, views: &Shown) -> io::Result<()> {
    let mut head = [0; HEAD_MAX];
    let mut len = 0;
    while len < HEAD_MAX && !is_whole(&head[..len]) {
        match client.read(&mut head[len..]).await? {
            0 => break,
            n => len += n,
        }
    }
    let views = views.borrow().clone();
    client.write_all(answer(&head[..len], || (views.unwell)()).as_bytes()).await?;
    // What of a request is left unread would reset the connection, and take the answer with it.
    client.close().await?;
    while client.read(&mut head).await? > 0 {}
    Ok(())
}
