//! The CA on disk: its key, the cluster's psk, and the certificates that it issued.
//!
//! ```text
//! ca.key      Ed25519 seed, base64, 0600      psk           "EPOCH BASE64" lines, current first, 0600
//! ca.pub      public key, base64              issued/NAME   certificate, base64
//! ```

use crate::encoding::BASE64;
use crate::{
    config::RelayName,
    tunnel::identity::{
        Authority, Bundle, BundleRelay, CaPublic, Certificate, EPOCHS_MAX, KeyPair, NAME_RULE, Psk, PublicKey,
        RELAYS_MAX, Request, Roles, Secret, node_name,
    },
};
use anyhow::{Context, bail, ensure};
use ring::rand::SystemRandom;
use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};
use zeroize::Zeroizing;

/// No file of a CA and no bundle is longer: eight relays with long names have 8 kB.
const FILE_MAX: u64 = 64 << 10;
const DAY: u64 = 86_400;
/// A hundred years: what a clock or a finger that slipped does not exceed unseen.
const DAYS_MAX: u64 = 36_500;

/// An opened CA directory.
#[derive(Debug)]
pub struct Ca {
    dir: PathBuf,
    authority: Authority,
    psks: Vec<Psk>,
}

/// What `weft ca issue` asks for.
#[derive(Clone, Debug)]
pub struct Order {
    pub node: String,
    pub roles: Roles,
    pub network: String,
    pub days: u64,
    /// The node's own key; None: one is made and goes into the bundle.
    pub public_key: Option<PublicKey>,
    pub relays: Vec<RelayName>,
}

impl Ca {
    /// Makes a directory with a new CA.
    ///
    /// # Errors
    /// When there is one already, or the directory cannot be written.
    pub fn init(dir: &Path) -> anyhow::Result<Self> {
        let rng = SystemRandom::new();
        let authority = Authority::generate(&rng)?;
        let psk = Psk { epoch: 1, key: Secret::random(&rng)? };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir.join("issued"))
            .with_context(|| format!("cannot make {}", dir.display()))?;
        for name in ["ca.key", "ca.pub", "psk"] {
            let path = dir.join(name);
            ensure!(!path.exists(), "{} is there already: a CA is not overwritten", path.display());
        }
        // The key after the psk: where there is a key, `open` finds all the rest or says what is missing.
        write_new(&dir.join("psk"), 0o600, &psk_lines(std::slice::from_ref(&psk)))?;
        write_new(&dir.join("ca.key"), 0o600, &(Zeroizing::new(format!("{}\n", *authority.seed().to_base64()))))?;
        write_new(&dir.join("ca.pub"), 0o644, &format!("{}\n", BASE64.encode(&authority.public().0)))?;
        Ok(Self { dir: dir.into(), authority, psks: vec![psk] })
    }

    /// # Errors
    /// When there is no CA in the directory, or it is damaged.
    pub fn open(dir: &Path) -> anyhow::Result<Self> {
        ensure!(
            dir.join("ca.key").exists(),
            "there is no CA in {}: `weft ca init --dir {0}` makes one, --dir names another",
            dir.display()
        );
        let key = read(&dir.join("ca.key"))?;
        let seed = Secret::from_base64(&key).context("ca.key: expected 32 bytes in base64")?;
        let authority = Authority::from_seed(seed)?;
        let public = read(&dir.join("ca.pub"))?;
        ensure!(
            BASE64.decode(public.trim().as_bytes()).is_ok_and(|p| p == authority.public().0),
            "{}: ca.pub is not the public half of ca.key",
            dir.display()
        );
        let psks = parse_psks(&read(&dir.join("psk"))?).context("psk")?;
        Ok(Self { dir: dir.into(), authority, psks })
    }

    #[must_use]
    pub fn public(&self) -> CaPublic {
        self.authority.public()
    }

    #[must_use]
    pub fn epochs(&self) -> Vec<u8> {
        self.psks.iter().map(|p| p.epoch).collect()
    }

    /// Every certificate that was issued, by name.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn issued(&self) -> anyhow::Result<Vec<Certificate>> {
        let mut out = Vec::new();
        for entry in fs::read_dir(self.dir.join("issued")).context("issued")? {
            let name = entry?.file_name();
            let Some(name) = name.to_str().filter(|n| node_name(n).is_some()) else { continue };
            out.extend(self.certificate(name)?);
        }
        out.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(out)
    }

    /// The certificate that was issued last for a name.
    ///
    /// # Errors
    /// When there is one that cannot be read or is not ours.
    pub fn certificate(&self, name: &str) -> anyhow::Result<Option<Certificate>> {
        ensure!(node_name(name).is_some(), "{name:?}: {NAME_RULE}");
        let path = self.dir.join("issued").join(name);
        if !path.exists() {
            return Ok(None);
        }
        let bytes = BASE64.decode(read(&path)?.trim().as_bytes()).ok().context("not base64");
        let certificate =
            bytes.and_then(|b| Ok(Certificate::decode(&b)?)).with_context(|| path.display().to_string())?;
        certificate.verify_signature(&self.public()).with_context(|| path.display().to_string())?;
        Ok(Some(certificate))
    }

    /// Signs a certificate and makes the bundle around it. Once that is written, [`Ca::keep`] the certificate.
    ///
    /// # Errors
    /// When the order cannot be met; the text says why.
    pub fn issue(&self, order: Order, now_unix: u64) -> anyhow::Result<Bundle> {
        let Order { node, roles, network, days, public_key, relays } = order;
        ensure!((1..=DAYS_MAX).contains(&days), "--days {days}: expected 1 to {DAYS_MAX}");
        ensure!(relays.len() <= RELAYS_MAX, "{} relays: at most {RELAYS_MAX}", relays.len());
        let relays = relays.into_iter().map(|at| self.relay(at, now_unix)).collect::<anyhow::Result<Vec<_>>>()?;
        for (i, relay) in relays.iter().enumerate() {
            ensure!(relays[..i].iter().all(|r| r.at.name != relay.at.name), "relay {} is named twice", relay.at.name);
        }
        let (key, public) = match public_key {
            Some(public) => (None, public),
            None => {
                let pair = KeyPair::generate(&SystemRandom::new())?;
                (Some(pair.private), pair.public)
            }
        };
        let request = Request { name: node, key: public, roles, network, not_after: now_unix + days * DAY };
        let certificate = self.authority.issue(request)?;
        Ok(Bundle { certificate, key, ca: self.public(), psks: self.psks.clone(), relays })
    }

    /// Remembers a certificate, for [`Ca::certificate`] and for the bundles of those that use this relay.
    ///
    /// # Errors
    /// When the directory cannot be written.
    pub fn keep(&self, certificate: &Certificate) -> anyhow::Result<()> {
        let path = self.dir.join("issued").join(&certificate.name);
        replace(&path, &format!("{}\n", BASE64.encode(&certificate.encode())))
    }

    fn relay(&self, at: RelayName, now_unix: u64) -> anyhow::Result<BundleRelay> {
        let name = &at.name;
        let Some(certificate) = self.certificate(name)? else {
            bail!("relay {name}: no certificate was issued; first: weft ca issue --node {name} --role relay");
        };
        certificate.verify(&self.public(), now_unix).with_context(|| format!("relay {name}"))?;
        ensure!(
            certificate.roles.contains(Roles::RELAY),
            "relay {name}: its certificate has not the role relay; again: weft ca issue --node {name} --role relay"
        );
        Ok(BundleRelay { at, certificate })
    }
}

/// Reads a bundle.
///
/// # Errors
/// When it cannot be read or does not fit together.
pub fn read_bundle(path: &Path) -> anyhow::Result<Bundle> {
    let text = read(path)?;
    Bundle::parse(&text).with_context(|| path.display().to_string())
}

/// Writes a bundle so that nobody but its owner can ever read it.
///
/// # Errors
/// When the file is there already or cannot be written.
pub fn write_bundle(path: &Path, bundle: &Bundle) -> anyhow::Result<()> {
    write_new(path, 0o600, &bundle.render())
}

/// 32 bytes of a public key in base64.
///
/// # Errors
/// When the text is anything else.
pub fn public_key(text: &str) -> Result<PublicKey, String> {
    let bytes = BASE64.decode(text.trim().as_bytes()).ok();
    bytes.and_then(|b| b.try_into().ok()).ok_or_else(|| "expected an X25519 public key: 32 bytes in base64".into())
}

fn parse_psks(text: &str) -> anyhow::Result<Vec<Psk>> {
    let line = |line: &str| {
        let (epoch, key) = line.split_once(' ')?;
        Some(Psk { epoch: epoch.parse().ok()?, key: Secret::from_base64(key)? })
    };
    let psks: Option<Vec<Psk>> = text.lines().map(line).collect();
    psks.filter(|p| (1..=EPOCHS_MAX).contains(&p.len())).context("expected one or two lines of an epoch and a key")
}

fn psk_lines(psks: &[Psk]) -> Zeroizing<String> {
    let mut out = Zeroizing::new(String::with_capacity(EPOCHS_MAX * 64));
    for psk in psks {
        out.push_str(&format!("{} ", psk.epoch));
        out.push_str(&psk.key.to_base64());
        out.push('\n');
    }
    out
}

fn read(path: &Path) -> anyhow::Result<Zeroizing<String>> {
    // Room for all of it: a String that grows leaves copies of its secrets behind.
    let mut text = Zeroizing::new(String::with_capacity(FILE_MAX as usize + 1));
    let read = File::open(path).and_then(|f| f.take(FILE_MAX + 1).read_to_string(&mut text));
    let len = read.with_context(|| path.display().to_string())?;
    ensure!(len as u64 <= FILE_MAX, "{}: longer than {FILE_MAX} bytes", path.display());
    Ok(text)
}

/// Creates the file with its final mode; a half-written one is taken away again.
fn write_new(path: &Path, mode: u32, text: &str) -> anyhow::Result<()> {
    let mut file = match OpenOptions::new().write(true).create_new(true).mode(mode).open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            bail!("{} is there already: take it away first, or name another file", path.display())
        }
        Err(e) => return Err(e).with_context(|| path.display().to_string()),
    };
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).with_context(|| {
        let _ = fs::remove_file(path);
        format!("cannot write {}", path.display())
    })
}

/// Puts a file in the place of an old one, whole or not at all. Not for secrets.
fn replace(path: &Path, text: &str) -> anyhow::Result<()> {
    // No node's name begins with a dot.
    let mut new = std::ffi::OsString::from(".");
    new.push(path.file_name().unwrap_or_default());
    let new = path.with_file_name(new);
    let _ = fs::remove_file(&new);
    write_new(&new, 0o644, text)?;
    fs::rename(&new, path).with_context(|| format!("cannot write {}", path.display()))
}
