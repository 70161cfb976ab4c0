use super::*;

const CONFIG: &str = "apiVersion: v1
kind: Config
clusters:
- name: test
  cluster:
    server: https://192.0.2.1:6443
    certificate-authority-data: Q0E=
contexts:
- name: test
  context: {cluster: test, user: me}
current-context: test
users:
- name: me
  user:
    USER
";

fn read(user: &str) -> Result<Access, String> {
    Access::from_kubeconfig(&CONFIG.replace("USER", user), Path::new("/etc/k"))
}

#[test]
fn all_that_a_kubeconfig_may_hold() {
    let access = read("client-certificate-data: Q0VSVA==\n    client-key: keys/me.key").unwrap();
    assert_eq!(access.servers, [Server { tls: true, host: "192.0.2.1".into(), port: 6443 }]);
    assert_eq!(access.ca, Some(Pem::Inline(Secret(b"CA".to_vec()))));
    let key = Pem::File("/etc/k/keys/me.key".into());
    assert_eq!(access.client, Some((Pem::Inline(Secret(b"CERT".to_vec())), key)));
    assert_eq!(access.token, Token::None);
    assert_eq!(read("token: abc").unwrap().token, Token::Inline(Secret("abc".into())));
    assert_eq!(read("token: abc\n    tokenFile: /t").unwrap().token, Token::File("/t".into()));
    assert!(!format!("{:?}", read("token: abc").unwrap()).contains("abc"));
    let json = r#"{"clusters":[{"name":"c","cluster":{"server":"http://127.0.0.1:10550"}}],
        "contexts":[{"name":"x","context":{"cluster":"c"}}],"current-context":"x","users":null}"#;
    let access = Access::from_kubeconfig(json, Path::new("/")).unwrap();
    assert!(access.servers[0].is_local() && access.servers[0].is_metaserver());
}

#[test]
fn what_is_refused_says_what_instead() {
    for (user, why) in [
        ("exec: {command: aws}", "exec is not done here; use a token (tokenFile) or a client certificate"),
        (
            "auth-provider: {name: gcp}",
            "auth-provider is not done here; use a token (tokenFile) or a client certificate",
        ),
        ("client-key: x", "of client-certificate and client-key one is missing"),
        ("client-key-data: '*'", "client-key-data is not base64"),
        ("token: 'a b'", "token has a character that none has"),
        ("token: [", "line 16: expected a value"),
    ] {
        assert_eq!(read(user).unwrap_err(), why);
    }
    let with = |from: &str, to: &str| {
        Access::from_kubeconfig(&CONFIG.replace("USER", "token: a").replace(from, to), Path::new("/")).unwrap_err()
    };
    assert_eq!(with("user: me}", "user: you}"), "users has no \"you\"");
    assert_eq!(with("current-context", "x"), "there is no current-context");
    assert_eq!(with("https://192.0.2.1:6443", "ftp://x"), "server \"ftp://x\": expected https://HOST:PORT");
    assert!(with("https:", "http:").contains("a token is not sent over plain http to another machine"));
    assert!(with("    server", "    insecure-skip-tls-verify: true\n    server").contains("name the CA"));
    assert!(with("    server", "    proxy-url: x\n    server").starts_with("proxy-url is not done here"));
}

#[test]
fn addresses() {
    let server = |tls, host: &str, port| Some(Server { tls, host: host.into(), port });
    for (text, want) in [
        ("https://a.example", server(true, "a.example", 443)),
        ("http://[::1]:8080/", server(false, "::1", 8080)),
        ("https://10.0.0.1:6443", server(true, "10.0.0.1", 6443)),
        ("https://", None),
        ("https://a:0", None),
        ("https://a/b", None),
        ("https://a:1:2", None),
        ("https://a b", None),
        ("https://u@a", None),
        ("a:1", None),
    ] {
        assert_eq!(Server::parse(text), want, "{text}");
    }
    assert_eq!(server(true, "::1", 2).unwrap().to_string(), "https://[::1]:2");
    assert_eq!(servers("https://a, https://b:1").map(|s| s.len()), Some(2));
    assert_eq!(servers("https://a http://b"), None);
    assert_eq!((token(" a.b \n"), token("\n"), token("a\nb")), (Some("a.b".into()), None, None));
}
