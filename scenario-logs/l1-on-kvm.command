nestvmm run /root/.cache/nestvmm/scenario-demo.img --exit-stats-json /tmp/nestvmm-scenario-ynwwdY/exits.json
