//! `hanse pause`, `hanse resume` and `hanse ready`: a socket in the data folder of the running node, for its owner alone.
//!
//! One line with a command, one line with the answer.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::AbortOnDropHandle;

/// A line is no longer than this.
const MAX_LINE: u64 = 4096;
/// Who says nothing for so long is not listened to any more.
const PATIENCE: Duration = Duration::from_secs(5);

/// What the owner may ask of a running node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Take no calls until further notice.
    Pause,
    /// Take calls again.
    Resume,
    /// Say whether all that is to be hosted is loaded.
    Ready,
}

impl Command {
    fn word(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Ready => "ready",
        }
    }
}

/// A command with where its answer, one line, goes.
#[derive(Debug)]
pub struct Request {
    /// What is asked.
    pub command: Command,
    /// Takes the answer.
    pub answer: oneshot::Sender<String>,
}

/// Listens for commands; the socket is removed when dropped.
#[derive(Debug)]
pub struct Control {
    path: PathBuf,
    requests: mpsc::Receiver<Request>,
    _task: AbortOnDropHandle<()>,
}

/// The socket of a data folder.
#[must_use]
pub fn socket(data_dir: &Path) -> PathBuf {
    data_dir.join("control.sock")
}

impl Control {
    /// Listens in `data_dir`, which must be held: a socket that an earlier node left behind is replaced.
    ///
    /// # Errors
    /// The socket cannot be made, for instance because its path is longer than the system allows.
    pub fn listen(data_dir: &Path) -> io::Result<Self> {
        let path = socket(data_dir);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        let (sender, requests) = mpsc::channel(1);
        let task = AbortOnDropHandle::new(tokio::spawn(serve(listener, sender)));
        Ok(Self { path, requests, _task: task })
    }

    /// The next request. Never ends; may be dropped and called again.
    pub async fn next(&mut self) -> Request {
        match self.requests.recv().await {
            Some(request) => request,
            None => std::future::pending().await,
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // A socket that stays behind is replaced by the next node.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Owners are few: one connection after another.
async fn serve(listener: UnixListener, requests: mpsc::Sender<Request>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                // Who is too slow has gone, and asks again.
                if let Ok(Err(error)) = tokio::time::timeout(PATIENCE, answer(stream, &requests)).await {
                    tracing::debug!(%error, "control connection");
                }
            }
            Err(error) => {
                tracing::warn!(%error, "control socket");
                tokio::time::sleep(PATIENCE).await;
            }
        }
    }
}

async fn answer(mut stream: UnixStream, requests: &mpsc::Sender<Request>) -> io::Result<()> {
    let line = read_line(&mut stream).await?;
    let known = [Command::Pause, Command::Resume, Command::Ready].into_iter().find(|command| command.word() == line);
    let text = match known {
        None => format!("error: {line:?} is not a command"),
        Some(command) => {
            let (answer, answered) = oneshot::channel();
            let request = Request { command, answer };
            let asked = requests.send(request).await.is_ok();
            let answered = if asked { answered.await.ok() } else { None };
            answered.unwrap_or_else(|| "error: the node is leaving".to_owned())
        }
    };
    stream.write_all(format!("{text}\n").as_bytes()).await?;
    stream.shutdown().await
}

async fn read_line(stream: &mut UnixStream) -> io::Result<String> {
    let mut line = String::new();
    BufReader::new(stream.take(MAX_LINE)).read_line(&mut line).await?;
    Ok(line.trim_end().to_owned())
}

/// Asks the node that runs with `data_dir`; its answer, one line.
///
/// # Errors
/// Nobody listens there, or does not answer in time.
pub async fn ask(data_dir: &Path, command: Command) -> io::Result<String> {
    let talk = async {
        let mut stream = UnixStream::connect(socket(data_dir)).await?;
        stream.write_all(format!("{}\n", command.word()).as_bytes()).await?;
        read_line(&mut stream).await
    };
    tokio::time::timeout(PATIENCE, talk).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_left_behind_is_replaced_and_only_the_owner_may_use_it() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let dir = tempfile::tempdir().unwrap();
            // As a node that was killed leaves it.
            drop(UnixListener::bind(socket(dir.path())).unwrap());
            assert!(ask(dir.path(), Command::Pause).await.is_err());
            let mut control = Control::listen(dir.path()).unwrap();
            let mode = std::fs::metadata(socket(dir.path())).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
            let asked = tokio::spawn({
                let dir = dir.path().to_owned();
                async move { ask(&dir, Command::Resume).await }
            });
            let request = control.next().await;
            assert_eq!(request.command, Command::Resume);
            request.answer.send("serving".into()).unwrap();
            assert_eq!(asked.await.unwrap().unwrap(), "serving");
            drop(control);
            assert!(!socket(dir.path()).exists());
        });
    }
}
