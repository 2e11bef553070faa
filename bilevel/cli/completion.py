"""Tab completion in bash for `python -m bilevel train`, `python -m experiments.train` and `bilevel train`.

Hydra's own script knows `python FILE` and installed programs, but neither `-m MODULE` nor a command after the program.
This one finds where the overrides begin and lets Hydra complete them.
"""

BASH = r"""_bilevel_complete() {
    local front words word
    for front in "-m bilevel train" "-m experiments.train" "bilevel train"; do
        if [[ "$COMP_LINE" == *"$front "* ]]; then
            local rest="${COMP_LINE#*"$front "}" program="${COMP_LINE%%"$front "*}$front"
            word="${rest##* }"
            words=$(COMP_LINE="train $rest" $program -sc query=bash 2> /dev/null)
            COMPREPLY=($(compgen -W "$words" -- "$word"))
            return
        fi
    done
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _bilevel_complete python python3 bilevel"""
