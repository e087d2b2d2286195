//! Connections: accepted, limited, and ended in order.

use super::state::Server;
use crate::failure::{Failure, INTERRUPTED, Result};
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Semaphore;

/// Limits of connections.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How long a client may take for the head of a request.
    pub header_time: Duration,
    /// How long requests may go on after a signal.
    pub drain_time: Duration,
    /// Connections at the same time; more wait to be accepted.
    pub connections: usize,
}

/// After the time is up, how long answers that say so may take.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Serves until SIGTERM, SIGINT or SIGHUP; then finishes what runs, as long as it may. A second signal ends the process.
pub async fn serve(
    listener: TcpListener,
    app: Router,
    server: Arc<Server>,
    limits: Limits,
    ready: impl FnOnce(),
) -> Result<()> {
    let failed = |error: std::io::Error| Failure::Refused(format!("cannot listen: {error}"));
    listener.set_nonblocking(true).map_err(failed)?;
    let listener = tokio::net::TcpListener::from_std(listener).map_err(failed)?;
    let mut signals = Signals::new().map_err(failed)?;
    let graceful = GracefulShutdown::new();
    let places = Arc::new(Semaphore::new(limits.connections));
    ready();
    loop {
        let accepted = tokio::select! {
            accepted = async {
                let place = places.clone().acquire_owned().await;
                (listener.accept().await, place)
            } => accepted,
            () = signals.next() => break,
        };
        let (stream, place) = match accepted {
            (Ok((stream, _)), Ok(place)) => (stream, place),
            // The client is gone already, or there are too many files open: others may have more luck in a moment.
            _ => {
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            }
        };
        // Pieces of an answer are small and must not wait for each other.
        stream.set_nodelay(true).ok();
        let service = TowerToHyperService::new(app.clone());
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(limits.header_time);
        let connection = graceful.watch(http.serve_connection(TokioIo::new(stream), service));
        tokio::spawn(async move {
            // How a connection ends is the client's business.
            connection.await.ok();
            drop(place);
        });
    }
    drop(listener);
    eprintln!("finishing {} requests (at most {} s)", server.scheduler.open_requests(), limits.drain_time.as_secs());
    server.scheduler.close();
    let second = tokio::spawn(async move {
        signals.next().await;
        std::process::exit(INTERRUPTED);
    });
    let finished = async {
        let mut shutdown = std::pin::pin!(graceful.shutdown());
        if tokio::time::timeout(limits.drain_time, &mut shutdown).await.is_err() {
            server.scheduler.abort();
            tokio::time::timeout(LAST_WORDS, &mut shutdown).await.ok();
        }
    };
    finished.await;
    second.abort();
    Ok(())
}

/// The signals that end the server.
struct Signals {
    all: [tokio::signal::unix::Signal; 3],
}

impl Signals {
    fn new() -> std::io::Result<Signals> {
        let all = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()];
        let [a, b, c] = all.map(signal);
        Ok(Signals { all: [a?, b?, c?] })
    }

    async fn next(&mut self) {
        let [a, b, c] = &mut self.all;
        tokio::select! {
            _ = a.recv() => {},
            _ = b.recv() => {},
            _ = c.recv() => {},
        }
    }
}
