#!/usr/bin/env bash
# The first start of compose.yaml: keys and passwords on volumes, and the checkout's commit as `main` of the git remote.
# What is there stays: it is called at each start.
set -euo pipefail
umask 077

server=/srv/keys/ssh-server   # of the git and the DVC remote: their host key, and who is let in
client=/srv/keys/ssh-client   # of the workers: their key, and whom they trust
secrets=/srv/keys/airflow     # of Airflow's services
database=/srv/keys/database   # of PostgreSQL, whose user is another
worker=/srv/keys/worker       # what of `secrets` a worker needs
repository=/srv/git/detector.git

fresh() { # the file, whole, with what the command prints, where there is none yet
  [ -s "$1" ] || { "${@:2}" >"$1.part" && mv "$1.part" "$1"; }
}
random() { head -c "$1" /dev/urandom | base64 | tr '+/' '-_' | tr -d '\n'; } # Airflow takes a file's newline along

[ -s "$server/id_rsa" ] || ssh-keygen -q -t ed25519 -N "" -C remotes -f "$server/id_rsa"
[ -s "$client/id_ed25519" ] || ssh-keygen -q -t ed25519 -N "" -C workers -f "$client/id_ed25519"
for host in "[git]:2222" "[dvc]:2223"; do echo "$host $(cut -d ' ' -f 1,2 "$server/id_rsa.pub")"; done >"$client/known_hosts"
# People who fetch and push: AUTHORIZED_KEYS, their public keys, a line each.
printf '%s\n' "$(cat "$client/id_ed25519.pub")" "${AUTHORIZED_KEYS:-}" >"$server/authorized_keys"

fresh "$secrets/fernet_key" random 32 # as Fernet asks
for name in api_secret_key jwt_secret; do fresh "$secrets/$name" random 64; done
fresh "$worker/jwt_secret" cat "$secrets/jwt_secret"
fresh "$database/password" random 32
chmod 755 "$database" && chmod 444 "$database/password"
fresh "$secrets/database" printf %s "postgresql+psycopg2://airflow:$(cat "$database/password")@postgres:5432/airflow"

[ -d "$repository" ] || { git init --quiet --bare --initial-branch=main "$repository.part" && mv "$repository.part" "$repository"; }
if ! git -C "$repository" rev-parse --quiet --verify main >/dev/null; then
  git -c safe.directory='*' -C /checkout push --quiet "file://$repository" HEAD:refs/heads/main
fi
