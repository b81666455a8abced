"""What containers run in the tests of the node."""

READY = "open('/tmp/ready', 'w').close()"
SLEEP = "import time; time.sleep(600)"
ON_TERM = """
import pathlib, signal, sys, time
def end(*_):
    print("got SIGTERM", flush=True)
    time.sleep(0.5)
    pathlib.Path("/dev/termination-log").write_text("checkpoint written")
    sys.exit(7)
signal.signal(signal.SIGTERM, end)
print("up", flush=True)
time.sleep(600)
"""
PEER = """
import os, socket, time
own, index = os.environ["POD_IP"], os.environ["JOB_COMPLETION_INDEX"]
if index == "0":
    with socket.create_server((own, 29500)) as server:
        connection, peer = server.accept()
        print("heard", connection.recv(64).decode(), "from", peer[0])
else:
    while True:
        try:
            connection = socket.create_connection((os.environ["HEAD"], 29500), 5, (own, 0))
            break
        except OSError as error:
            print(error, flush=True)
            time.sleep(0.1)
    connection.sendall(b"rank " + index.encode())
"""
API_CALL = """
import json, os, pathlib, ssl, urllib.error, urllib.request
home = pathlib.Path("/var/run/secrets/kubernetes.io/serviceaccount")
namespace = (home / "namespace").read_text()
server = os.environ["KUBERNETES_SERVICE_HOST"] + ":" + os.environ["KUBERNETES_SERVICE_PORT"]
context = ssl.create_default_context(cafile=str(home / "ca.crt"))
for kind in ("pods", "secrets"):
    request = urllib.request.Request(
        f"https://{server}/api/v1/namespaces/{namespace}/{kind}",
        headers={"Authorization": "Bearer " + (home / "token").read_text()},
    )
    try:
        with urllib.request.urlopen(request, context=context) as answer:
            print(kind, [item["metadata"]["labels"]["app"] for item in json.load(answer)["items"]])
    except urllib.error.HTTPError as error:
        print(kind, error.code)
print("done", flush=True)
import time; time.sleep(600)
"""
RESTRICTED = """
import os
print(os.getuid(), os.getgid(), os.getgroups(), os.getcwd())
for place in ("/", "/etc", "/usr", "/tmp", "/dev/shm", "/scratch", "/config"):
    try:
        open(place + "/probe", "w").close(); print(place, "writable")
    except OSError as error:
        print(place, error.strerror)
print(oct(os.stat("/config/a").st_mode & 0o777), os.path.exists("/var/run/secrets/kubernetes.io"))
print(open("/proc/self/status").read().split("NoNewPrivs:")[1].split()[0])
"""
