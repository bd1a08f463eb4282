//! The HTTP store on a server that knows `GET`, `PUT` and `DELETE` only, as Mooncake's does.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use tidewire_engine::metadata::{Lifetime, StoreOptions};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
};

use super::support::open;

type Keys = Arc<Mutex<BTreeMap<String, Vec<u8>>>>;

/// Answers the requests of one connection; nothing of it is checked.
async fn serve(stream: TcpStream, keys: Keys) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let (mut first, mut length) = (String::new(), 0);
        if stream.read_line(&mut first).await? == 0 {
            return Ok(());
        }
        loop {
            let mut line = String::new();
            stream.read_line(&mut line).await?;
            let line = line.trim().to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some(text) = line.strip_prefix("content-length:") {
                length = text.trim().parse().unwrap();
            }
        }
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await?;
        let mut words = first.split(' ');
        let (method, target) = (words.next().unwrap(), words.next().unwrap().to_owned());
        let found = {
            let mut keys = keys.lock().unwrap();
            match method {
                "PUT" => {
                    keys.insert(target, body);
                    Some(Vec::new())
                }
                "DELETE" => keys.remove(&target).map(|_| Vec::new()),
                _ => keys.get(&target).cloned(),
            }
        };
        let status = if found.is_some() { "200 OK" } else { "404 Not Found" };
        let body = found.unwrap_or_default();
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n", body.len());
        stream.write_all(head.as_bytes()).await?;
        stream.write_all(&body).await?;
    }
}

#[tokio::test]
async fn closing_leaves_the_keys_that_another_has_put_since() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let uri = format!("http://{}/metadata", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let keys = Keys::default();
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream, keys.clone()));
        }
    });
    let (first, second) =
        (open(&uri, &StoreOptions::default()).await.unwrap(), open(&uri, &StoreOptions::default()).await.unwrap());
    assert!(!first.capabilities().leases);
    for key in ["taken", "kept"] {
        first.put(key, b"first", Lifetime::Session).await.unwrap();
    }
    second.put("taken", b"second", Lifetime::Session).await.unwrap();
    first.close().await.unwrap();
    assert_eq!(second.get("taken").await.unwrap().unwrap().value, b"second");
    assert_eq!(second.get("kept").await.unwrap(), None);
}
