//! Request bodies that are not sent to their end, against our metadata server.

use std::time::{Duration, Instant};

use tidewire_engine::metadata::server::{MetadataServer, ServerOptions};
use tokio::{io::AsyncWriteExt, net::TcpStream};

use super::support::{http, until};

const KEY: &str = "/metadata?key=a";

/// Announces `length` bytes and sends `sent` of them.
async fn half(server: &MetadataServer, length: usize, sent: usize) -> TcpStream {
    let mut stream = TcpStream::connect(server.local_addr()).await.unwrap();
    let head = format!("PUT /metadata?key=b HTTP/1.1\r\nHost: h\r\nContent-Length: {length}\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(&vec![b'x'; sent]).await.unwrap();
    stream
}

async fn start(options: ServerOptions) -> MetadataServer {
    MetadataServer::start("127.0.0.1:0".parse().unwrap(), options).await.unwrap()
}

#[tokio::test]
async fn half_sent_bodies_do_not_stop_the_writes_of_others() {
    let options = ServerOptions::default();
    let length = options.limits.max_value_bytes;
    let count = 2 * options.max_bodies_bytes / length;
    let server = start(options).await;
    let mut open = Vec::new();
    for _ in 0..count {
        open.push(half(&server, length, 1).await);
    }
    let address = server.local_addr().to_string();
    let started = Instant::now();
    assert_eq!(http(&address, "PUT", KEY, &"x".repeat(1 << 20)).await.0, 200);
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    server.stop().await;
}

#[tokio::test]
async fn without_room_long_bodies_are_told_so_and_short_ones_pass() {
    let mut options = ServerOptions::default();
    options.max_bodies_bytes = 64 << 10;
    let server = start(options).await;
    let address = server.local_addr().to_string();
    let holder = half(&server, 200 << 10, 150 << 10).await;
    until("the room is taken", || async {
        (http(&address, "PUT", KEY, &"x".repeat(50 << 10)).await.0 == 503).then_some(())
    })
    .await;
    assert_eq!(http(&address, "PUT", KEY, &"x".repeat(10 << 10)).await.0, 200);
    drop(holder);
    until("the room is given back", || async {
        (http(&address, "PUT", KEY, &"x".repeat(150 << 10)).await.0 == 200).then_some(())
    })
    .await;
    server.stop().await;
}
