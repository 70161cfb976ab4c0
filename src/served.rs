//! What peers want of us: each stream that one opens goes to an endpoint of ours.

use crate::{
    metrics::bump,
    proxy::{CONNECT, Shared},
    reactor::LocalExecutor,
    streamed,
    table::model::{Protocol, ServiceId},
    tunnel::{Open, Refusal, TunnelStream},
};
use futures_lite::{AsyncWriteExt as _, future::or};
use std::rc::Rc;

/// Takes the streams that peers open, for ever.
pub(crate) async fn peers<'x>(shared: &Rc<Shared>, sessions: &LocalExecutor<'x>) {
    let mut changed = shared.tunnel.listen();
    loop {
        let accepted = async {
            match shared.tunnel.read(Clone::clone) {
                Some(tunnel) => Some(tunnel.accept().await),
                None => std::future::pending().await,
            }
        };
        let other = async {
            changed.rung().await;
            None
        };
        let Some((mut stream, peer, open)) = or(accepted, other).await else { continue };
        bump(&shared.counters.remote_opens);
        match Shared::place(shared) {
            Some(place) => sessions.spawn(async move { open_own(&place.0, stream, &peer, open).await }).detach(),
            None => {
                bump(&shared.counters.refused_full);
                stream.answer(&Err(Refusal::Busy));
            }
        }
    }
}

/// Opens one of our own endpoints for a peer: what the table does not say is ours is refused.
async fn open_own(shared: &Shared, mut stream: TunnelStream, peer: &str, open: Open) {
    let ServiceId { namespace, name } = &open.service;
    let wanted = format!("{namespace}/{name}:{} at {}", open.port, open.endpoint);
    let refusal = if !owns(shared, &open) {
        bump(&shared.counters.remote_refused);
        shared.say(|| format!("refused {peer}, which wants {wanted}: not an endpoint of this node"));
        Refusal::NotMine
    } else if open.protocol == Protocol::Udp {
        match shared.dial_udp(&open.endpoint) {
            Ok(socket) => {
                stream.answer(&Ok(()));
                return crate::udp::serve(shared, socket, stream).await;
            }
            Err(e) => Refusal::ConnectFailed(e.to_string()),
        }
    } else {
        match shared.dial(&open.endpoint, CONNECT).await {
            Ok(socket) => {
                stream.answer(&Ok(()));
                let counters = &shared.counters;
                let done =
                    streamed::stream(&shared.pool, socket, stream, &counters.bytes_down, &counters.bytes_up).await;
                return log::debug!("{wanted} for {peer}: {done:?}");
            }
            Err(e) => {
                shared.say(|| format!("{peer} wants {wanted}: cannot connect: {e}"));
                Refusal::ConnectFailed(e.to_string())
            }
        }
    };
    stream.answer(&Err(refusal));
    let _ = stream.close().await;
}

/// Whether an endpoint is ours by our own table.
fn owns(shared: &Shared, open: &Open) -> bool {
    let Open { service, port, protocol, endpoint } = open;
    *protocol != Protocol::Sctp && shared.table.read(|t| t.owns(&shared.here, service, *port, *protocol, *endpoint))
}
