"""A real Kubernetes API server in a lab: etcd and kube-apiserver, from where they are built, with TLS and RBAC."""
import base64
import concurrent.futures
import http.client
import json
import os
import shutil
import ssl
import subprocess
import threading

from .world import wait_for

BIN = os.path.join(os.environ.get("KUBE_ROOT", "/var/tmp/weft-kube"), "bin")
NEEDED = ("etcd", "etcdctl", "kube-apiserver", "kubectl")
PORT = 6443
VIP = "10.96.0.1"  # the first of --service-cluster-ip-range
PATIENCE = 60.0
BULK = "bulk"


def missing():
    """What of it is not built; empty where all is there."""
    return [tool for tool in NEEDED if not os.access(f"{BIN}/{tool}", os.X_OK)]


class ApiServer:
    def __init__(self, node):
        self.node, self.folder = node, f"{node.lab.folder}/kube"
        os.makedirs(f"{self.folder}/etcd")
        self.local, self.processes = threading.local(), {}
        self._openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-keyout", "ca.key",
                      "-out", "ca.crt", "-subj", "/CN=ca", "-addext", "basicConstraints=critical,CA:TRUE")
        self._certificate("server", "/CN=kube-apiserver", f"IP:{node.address},IP:{VIP},IP:127.0.0.1")
        self._certificate("admin", "/O=system:masters/CN=admin", "DNS:admin")
        self._openssl("genpkey", "-algorithm", "RSA", "-out", "sa.key")
        self._openssl("pkey", "-in", "sa.key", "-pubout", "-out", "sa.pub")
        self.tls = ssl.create_default_context(cafile=f"{self.folder}/ca.crt")
        self.tls.load_cert_chain(f"{self.folder}/admin.crt", f"{self.folder}/admin.key")
        self.start()

    @property
    def url(self):
        return f"https://{self.node.address}:{PORT}"

    def _openssl(self, *args):
        subprocess.run(["openssl", *args], cwd=self.folder, check=True, capture_output=True)

    def _certificate(self, name, subject, names):
        with open(f"{self.folder}/{name}.ext", "w", encoding="ascii") as f:
            f.write(f"extendedKeyUsage=serverAuth,clientAuth\nsubjectAltName={names}\n")
        self._openssl("req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{name}.key",
                      "-subj", subject, "-out", f"{name}.csr")
        self._openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
                      "-out", f"{name}.crt", "-extfile", f"{name}.ext")

    # ---- processes

    def start(self, *names):
        for name in names or ("etcd", "kube-apiserver"):
            self.processes[name] = self.node.spawn(f"{BIN}/{name}", *getattr(self, f"_{name.replace('-', '_')}")())
        wait_for(self.ready, PATIENCE, 0.1, what=lambda: f"the API server is ready; its log:\n{self.processes['kube-apiserver'].text()[-2000:]}")

    def stop(self, *names):
        for name in names or ("kube-apiserver", "etcd"):
            self.processes.pop(name).end()
        self.local = threading.local()

    def _etcd(self):
        return [f"--data-dir={self.folder}/etcd", "--unsafe-no-fsync", "--log-level=error"]

    def _kube_apiserver(self):
        f = self.folder
        return [f"--bind-address={self.node.address}", f"--advertise-address={self.node.address}", f"--secure-port={PORT}",
                "--etcd-servers=http://127.0.0.1:2379", f"--tls-cert-file={f}/server.crt", f"--tls-private-key-file={f}/server.key",
                f"--client-ca-file={f}/ca.crt", "--authorization-mode=RBAC", "--disable-admission-plugins=ServiceAccount",
                "--service-account-issuer=https://kubernetes.default.svc", f"--service-account-key-file={f}/sa.pub",
                f"--service-account-signing-key-file={f}/sa.key", "--service-cluster-ip-range=10.96.0.0/16", "--profiling=false",
                f"--audit-policy-file={self._policy()}", f"--audit-log-path={f}/audit.log", "--endpoint-reconciler-type=none"]

    def _policy(self):
        path = f"{self.folder}/audit.json"
        with open(path, "w", encoding="ascii") as f:
            json.dump({"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"], "rules": [
                {"level": "Metadata", "users": ["system:serviceaccount:kube-system:weft"]}, {"level": "None"}]}, f)
        return path

    def ready(self):
        try:
            return self.request("GET", "/readyz")[0] == 200
        except OSError:
            return False

    def backup(self):
        """etcd's folder, while it stands still."""
        self.stop()
        shutil.copytree(f"{self.folder}/etcd", f"{self.folder}/backup")
        self.start()

    def restore(self):
        self.stop()
        shutil.rmtree(f"{self.folder}/etcd")
        shutil.copytree(f"{self.folder}/backup", f"{self.folder}/etcd")
        self.start()

    def compact(self):
        """What is older than now is gone from etcd."""
        def ctl(*args):
            return self.node.run(f"{BIN}/etcdctl", *args)
        ctl("compact", str(json.loads(ctl("endpoint", "status", "-w", "json"))[0]["Status"]["header"]["revision"]))

    def lists(self):
        """Complete lists that the agent was given so far, by resource. WatchLists count; further pages do not, nor does
        a look at the version (limit=1)."""
        found = {}
        with open(f"{self.folder}/audit.log", encoding="utf-8") as f:
            for line in f:
                entry = json.loads(line)
                uri, given = entry["requestURI"], entry.get("responseStatus", {}).get("code") == 200
                whole = entry["verb"] == "list" and "limit=1" not in uri.split("&") + uri.split("?") and "continue=" not in uri
                if given and (whole or "sendInitialEvents" in uri):
                    found.setdefault(entry["objectRef"]["resource"], set()).add(entry["auditID"])
        return {resource: len(ids) for resource, ids in found.items()}

    # ---- requests

    def server_side(self):
        """For a server that is taken for this one."""
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(f"{self.folder}/server.crt", f"{self.folder}/server.key")
        return tls

    def connection(self):
        connection = http.client.HTTPConnection(self.node.address, PORT)
        plain = self.node.tcp(self.node.address, PORT, timeout=None)
        connection.sock = self.tls.wrap_socket(plain, server_hostname=self.node.address)
        return connection

    def request(self, method, path, body=None):
        for attempt in (0, 1):
            connection = getattr(self.local, "connection", None)
            if connection is None:
                connection = self.local.connection = self.connection()
                connection.sock.settimeout(30)
            try:
                connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                return answer.status, json.loads(text) if (text := answer.read()).startswith(b"{") else text
            except (http.client.HTTPException, OSError):
                self.local.connection = None
                if attempt:
                    raise

    def must(self, method, path, body=None, allowed=()):
        status, answer = self.request(method, path, body)
        if status >= 300 and status not in allowed:
            raise AssertionError(f"{method} {path}: {status} {answer}")
        return answer

    def kubeconfig(self):
        """For kubectl and its like, which may do all."""
        def inline(name):
            with open(f"{self.folder}/{name}", "rb") as f:
                return base64.b64encode(f.read()).decode()
        config = {"apiVersion": "v1", "kind": "Config", "current-context": "x",
                  "clusters": [{"name": "c", "cluster": {"server": self.url, "certificate-authority-data": inline("ca.crt")}}],
                  "users": [{"name": "u", "user": {"client-certificate-data": inline("admin.crt"), "client-key-data": inline("admin.key")}}],
                  "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}]}
        with open(f"{self.folder}/kubeconfig", "w", encoding="ascii") as f:
            json.dump(config, f)

    def apply(self, path):
        self.kubeconfig()
        return self.node.run(f"{BIN}/kubectl", "--kubeconfig", f"{self.folder}/kubeconfig", "apply", "-f", path)

    def token(self, account):
        """Of a ServiceAccount of kube-system."""
        path = f"/api/v1/namespaces/kube-system/serviceaccounts/{account}/token"
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 3600}}
        return self.must("POST", path, body)["status"]["token"]

    # ---- Services in bulk

    def make(self, numbers, endpoints=3, note=None, nodes=None):
        """Services svc-N with an EndpointSlice each, whose endpoints are spread over the nodes."""
        self.must("POST", "/api/v1/namespaces", {"metadata": {"name": BULK}}, allowed=(409,))

        def one(n):
            name = f"svc-{n}"
            meta = {"name": name, "annotations": {"note": note}} if note else {"name": name}
            self.must("POST", f"/api/v1/namespaces/{BULK}/services", {"metadata": meta, "spec": {"ports": [{"port": 80}]}})
            self.must("POST", f"/apis/discovery.k8s.io/v1/namespaces/{BULK}/endpointslices", self._slice(n, endpoints, nodes))
        self._each(one, numbers)

    def make_one(self, name, address, port):
        """A Service with one endpoint that is there."""
        self.must("POST", f"/api/v1/namespaces/{BULK}/services", {"metadata": {"name": name}, "spec": {"ports": [{"port": 80}]}})
        self.must("POST", f"/apis/discovery.k8s.io/v1/namespaces/{BULK}/endpointslices", {
            "metadata": {"name": name, "labels": {"kubernetes.io/service-name": name}}, "addressType": "IPv4",
            "ports": [{"name": "", "port": port}], "endpoints": [{"addresses": [address], "conditions": {"ready": True}}]})

    @staticmethod
    def _slice(n, endpoints, nodes=None, ready=True):
        addresses = [f"10.{100 + n // 8000}.{n // 32 % 250}.{n % 32 * 7 + i + 1}" for i in range(endpoints)]

        def one(i, address):
            node = {"nodeName": nodes[(n + i) % len(nodes)], "zone": f"zone-{(n + i) % len(nodes) % 3}"} if nodes else {}
            return {"addresses": [address], "conditions": {"ready": ready, "serving": ready, "terminating": False}, **node}
        return {"metadata": {"name": f"svc-{n}", "labels": {"kubernetes.io/service-name": f"svc-{n}"}}, "addressType": "IPv4",
                "ports": [{"name": "", "port": 8080}], "endpoints": [one(i, a) for i, a in enumerate(addresses)]}

    def touch(self, numbers, ready):
        """Another state of the slices' endpoints."""
        def one(n):
            self.must("PUT", f"/apis/discovery.k8s.io/v1/namespaces/{BULK}/endpointslices/svc-{n}", self._slice(n, 3, ready=ready))
        self._each(one, numbers)

    def drop(self, numbers):
        def one(n):
            self.must("DELETE", f"/api/v1/namespaces/{BULK}/services/svc-{n}")
            self.must("DELETE", f"/apis/discovery.k8s.io/v1/namespaces/{BULK}/endpointslices/svc-{n}")
        self._each(one, numbers)

    @staticmethod
    def _each(one, numbers):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(one, numbers))

    def world(self):
        """What `weft services` should say: {name: (addresses, endpoints)}."""
        slices = {}
        for item in self.must("GET", "/apis/discovery.k8s.io/v1/endpointslices")["items"]:
            key = item["metadata"]["namespace"], item["metadata"]["labels"].get("kubernetes.io/service-name")
            slices[key] = slices.get(key, 0) + len(item["endpoints"] or [])
        found = {}
        for item in self.must("GET", "/api/v1/services")["items"]:
            key = item["metadata"]["namespace"], item["metadata"]["name"]
            found[key] = (tuple(item["spec"]["clusterIPs"]), tuple(p["port"] for p in item["spec"]["ports"]), slices.get(key, 0))
        return found
