{{- define "distillation-chain.name" -}}
{{- default .Release.Name .Values.name -}}
{{- end -}}

{{- define "distillation-chain.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.labels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "distillation-chain.secretName" -}}
{{- if .Values.storage.credentials.create -}}
{{- default (printf "%s-s3" (include "distillation-chain.name" .)) .Values.storage.secretName -}}
{{- else -}}
{{- .Values.storage.secretName -}}
{{- end -}}
{{- end -}}

{{/* Names of the jobs of a stage of this chain, with blanks between: (list chain stage). */}}
{{- define "distillation-chain.jobs" -}}
{{- $job := printf "%s-%s" (index . 0) (index . 1).name -}}
{{- $names := list -}}
{{- range dig "sweep" "temperature" list (index . 1) -}}
{{- $names = append $names (printf "%s-t%s" $job (toString . | replace "." "-")) -}}
{{- end -}}
{{- default (list $job) $names | join " " -}}
{{- end -}}

{{/* JSON: the second object merged over the first; lists are replaced, false and 0 count. */}}
{{- define "distillation-chain.merge" -}}
{{- $result := deepCopy (index . 0) -}}
{{- range $key, $over := index . 1 -}}
{{- $base := get $result $key -}}
{{- if and (kindIs "map" $over) (kindIs "map" $base) -}}
{{- $_ := set $result $key (include "distillation-chain.merge" (list $base $over) | fromJson) -}}
{{- else -}}
{{- $_ := set $result $key $over -}}
{{- end -}}
{{- end -}}
{{- toJson $result -}}
{{- end -}}

{{/* JSON: what all stages share. */}}
{{- define "distillation-chain.template" -}}
{{- $template := dict "distill" .Values.distill -}}
{{- range $key := list "data" "training" "workers" "teacher" "checkpoint" "evaluation" -}}
{{- with index $.Values $key -}}
{{- $_ := set $template $key . -}}
{{- end -}}
{{- end -}}
{{- range $key := list "backoffLimit" "activeDeadlineSeconds" "stallTimeoutSeconds" -}}
{{- if hasKey $.Values $key -}}
{{- $_ := set $template $key (index $.Values $key) -}}
{{- end -}}
{{- end -}}
{{- $storage := pick .Values.storage "uri" "endpoint" "region" -}}
{{- with include "distillation-chain.secretName" . -}}
{{- $_ := set $storage "secretRef" (dict "name" .) -}}
{{- end -}}
{{- $_ := set $template "storage" $storage -}}
{{- toJson $template -}}
{{- end -}}

{{/* The methods that a stage names, with blanks between; "distill" where it names none. */}}
{{- define "distillation-chain.methods" -}}
{{- $found := list -}}
{{- range $method := list "distill" "fineTune" "prune" "quantize" "evaluate" -}}
{{- if hasKey $ $method -}}
{{- $found = append $found $method -}}
{{- end -}}
{{- end -}}
{{- default (list "distill") $found | join " " -}}
{{- end -}}

{{/* JSON: the chain's spec. A stage of another method puts the template's and the teacher aside. */}}
{{- define "distillation-chain.spec" -}}
{{- $template := include "distillation-chain.template" . | fromJson -}}
{{- $spec := dict "template" $template "stages" .Values.stages -}}
{{- with .Values.initialTeacher -}}
{{- $_ := set $spec "initialTeacher" . -}}
{{- end -}}
{{- range $key := list "suspend" "onGateFailure" -}}
{{- if hasKey $.Values $key -}}
{{- $_ := set $spec $key (index $.Values $key) -}}
{{- end -}}
{{- end -}}
{{- toJson $spec -}}
{{- end -}}

{{/* JSON: the last stage's job, without a teacher. */}}
{{- define "distillation-chain.controlSpec" -}}
{{- $template := omit (include "distillation-chain.template" . | fromJson) "distill" "teacher" -}}
{{- $stage := omit (last .Values.stages) "name" "sweep" "retries" "onGateFailure" "gates" "teacher" "distill" "fineTune" "prune" "quantize" "evaluate" -}}
{{- $spec := include "distillation-chain.merge" (list $template $stage) | fromJson -}}
{{- $_ := set $spec "fineTune" dict -}}
{{- if hasKey .Values "suspend" -}}
{{- $_ := set $spec "suspend" .Values.suspend -}}
{{- end -}}
{{- toJson $spec -}}
{{- end -}}

{{/* What the schema of the values cannot say. */}}
{{- define "distillation-chain.check" -}}
{{- $taught := hasKey .Values.initialTeacher "model" -}}
{{- range $index, $_ := .Values.stages -}}
{{- $methods := include "distillation-chain.methods" . | splitList " " -}}
{{- $distils := has "distill" $methods -}}
{{- if not (or .student (and $index (not $distils))) -}}
{{- fail (printf "stage %s has no student: set student.model.uri, student.fromTeacher.layers, student.config or student.fromJob.name" .name) -}}
{{- end -}}
{{- if and (not $.Values.data.sources) (not (dig "data" "sources" list .)) -}}
{{- fail (printf "stage %s has no data: set data.sources, such as [{uri: s3://data/chats.jsonl}]" .name) -}}
{{- end -}}
{{- if gt (len $methods) 1 -}}
{{- fail (printf "stage %s has %d methods: keep one of %s" .name (len $methods) (join ", " $methods)) -}}
{{- end -}}
{{- if $distils -}}
{{- $own := default dict .teacher -}}
{{- if not (or $taught (hasKey $own "model") (hasKey $own "fromJob")) -}}
{{- fail (printf "stage %s has no teacher: set initialTeacher.model.uri" .name) -}}
{{- end -}}
{{- end -}}
{{- $taught = true -}}
{{- end -}}
{{- if .Values.storage.credentials.create -}}
{{- if not (and .Values.storage.credentials.accessKeyId .Values.storage.credentials.secretAccessKey) -}}
{{- fail "storage.credentials.create needs storage.credentials.accessKeyId and secretAccessKey" -}}
{{- end -}}
{{- end -}}
{{- if .Values.control.enabled -}}
{{- $last := last .Values.stages -}}
{{- if not $last.student -}}
{{- fail (printf "control.enabled: the last stage %s has no student of its own" $last.name) -}}
{{- end -}}
{{- if hasKey $last.student "fromTeacher" -}}
{{- fail (printf "control.enabled: the student of the last stage %s is fromTeacher, and the control has no teacher; give student.config or student.model" $last.name) -}}
{{- end -}}
{{- if and (hasKey $last.student "config") (not (or .Values.data.tokenizer (dig "data" "tokenizer" dict $last))) -}}
{{- fail "control.enabled: a student by config without a teacher needs data.tokenizer.uri" -}}
{{- end -}}
{{- range .Values.stages -}}
{{- if eq .name "control" -}}
{{- fail "control.enabled: no stage can be named control as well" -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
