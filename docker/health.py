"""`health.py PART`: exit 0 where the API server lately heard of scheduler, dag_processor, triggerer or metadatabase.

For compose.yaml. `airflow jobs check` asks the same, for seconds of a core each time.
"""

import json
import sys
import urllib.request

with urllib.request.urlopen("http://api-server:8080/api/v2/monitor/health", timeout=10) as answer:
    sys.exit(json.load(answer)[sys.argv[1]]["status"] != "healthy")
